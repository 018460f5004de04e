#!/bin/sh
# Waits on a spot machine for the notice that AWS gives two minutes ahead, and tells Ray that this node is going: Ray Train
# then has a checkpoint saved and counts a preemption. On an on-demand machine there is never one. Needs the head's address.
metadata=${METADATA_URL:-http://169.254.169.254}/latest
until token=$(curl -sf -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' "$metadata/api/token") &&
    curl -sf -H "X-aws-ec2-metadata-token: $token" "$metadata/meta-data/spot/instance-action"; do
    sleep 5
done
exec ray drain-node --address "$1" --reason DRAIN_NODE_REASON_PREEMPTION --reason-message 'spot notice' \
    --deadline-remaining-seconds 100
