"""Turn an exception into one line that says what is wrong and what to do."""

import errno
import re
import signal

from fmdistill import stop

# The setting that lowers the memory of each stage.
SMALLER = {
    "caching": "teacher.batch",
    "training": "train.accumulate, which cuts the same batch into more pieces (raise it)",
    "evaluating": "points_per_batch or batch in the protocol",
}
STAGES = {
    "cache": ["caching"],
    "verify": ["caching"],
    "distill": ["training"],
    "evaluate": ["evaluating"],
    "plan": ["caching", "training"],
    "bench": ["caching"],
}


def stopped(error: BaseException) -> int | None:
    """Return the number of the signal that stopped the run, None if an error ended it."""
    if isinstance(error, KeyboardInterrupt):
        return getattr(error, "number", signal.SIGINT)
    # A training process that is in a reduction during a stop gets this error when the others have ended.
    return stop.requested() if isinstance(error, RuntimeError) and "closed by peer" in str(error) else None


def line(error: BaseException) -> str:
    """Return the error's message in one line, with the way out if a disk is full or a name is taken."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{text}; free some space, then the same command continues where it stopped"
    if isinstance(error, FileExistsError | NotADirectoryError):
        return f"{text}; expected a folder, choose another name"
    return text


def machine(error: RuntimeError, verb: str) -> str | None:
    """Return a line for an error from too little memory, with the setting to change; None for any other error."""
    from torch import OutOfMemoryError

    if isinstance(error, OutOfMemoryError):
        stages = STAGES.get(verb, list(SMALLER))
        hints = "; ".join(f"while {stage}, change {SMALLER[stage]}" for stage in stages)
        return f"{str(error).splitlines()[0].partition('. ')[0]}: the GPU's memory is full; {hints}"
    if re.match(r"DataLoader worker \(pid(\(s\))? [\d, ]+\) (is killed by signal|exited unexpectedly)", str(error)):
        return (
            f"{str(error).splitlines()[0].partition('. ')[0]}: an image-loading process was killed, usually for lack "
            "of memory; lower train.workers, and in a container provide shared memory (docker run --ipc=host)"
        )
    return None
