"""A small procedural world: scenes, landmarks, masks and web pairs, so that demo and tests run offline."""
