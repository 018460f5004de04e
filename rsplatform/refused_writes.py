"""Why a disk takes no more bytes, from whatever a library has raised: in, an error; out, a reason for a person."""

# How libraries say that a disk takes no more bytes: Lance and safetensors by number, SQLite in prose.
_REFUSALS = {
    "no space is left on a disk": ("no space left on device", "os error 28", "disk is full", "disk quota exceeded"),
    "a disk is read-only": ("read-only file system", "os error 30", "readonly database"),
}


def refused_write(error: BaseException) -> str | None:
    """Why the disk took no more bytes, if that is what an error or one behind it (also a remote one) says."""
    told = ""
    link: BaseException | None = error
    while link is not None:
        told += f"{link}\n".lower()
        link = link.__cause__ or link.__context__
    return next((reason for reason, phrases in _REFUSALS.items() if any(phrase in told for phrase in phrases)), None)
