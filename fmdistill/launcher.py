"""What a launcher (torchrun, `accelerate launch`, MPI) says in the environment about this process and the others."""

import os

from fmdistill.registry import UserError

# What torchrun and `accelerate launch` set, and PyTorch needs to bring several training processes together.
ADDRESS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # accelerate reads them too


def processes() -> tuple[int, int]:
    """Return this process's rank and how many a launcher started; (0, 1) if none did.

    Caching needs no more: its processes share a folder, and none waits for another.
    """
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise UserError(
            f"RANK={rank}, WORLD_SIZE={world} in the environment: expected this process's number, counted from 0, and "
            "how many there are, as a launcher sets them; unset both to run one process"
        )
    return int(rank), int(world)


def local_rank() -> int | None:
    """Return this process's number among those of its machine; None if no launcher gave it one."""
    given = os.environ.get("LOCAL_RANK", "")
    if given in ("", "-1"):  # "no launcher", for PyTorch and accelerate
        return None
    if not given.isdecimal():
        raise UserError(f"LOCAL_RANK='{given}' in the environment: expected a number, 0 or more; or unset it")
    return int(given)


def check_training() -> None:
    """Raise a UserError if the launcher's variables are too few, or no numbers, for processes that train together."""
    given = {name: os.environ[name] for name in (*ADDRESS, *NUMBERS, *MPI) if name in os.environ}
    if local_rank() is None:
        given.pop("LOCAL_RANK", None)
    for name in (*NUMBERS, *MPI):
        if name in given and not given[name].isdecimal():
            raise UserError(f"{name}='{given[name]}' in the environment: expected a number, 0 or more; {_way_out()}")
    _, world = processes()
    missing = [name for name in ADDRESS if not given.get(name)]
    by_mpi = next((name for name in MPI if int(given.get(name, "1")) > 1), None)
    if by_mpi and missing:
        raise UserError(
            f"{by_mpi}={given[by_mpi]} in the environment: MPI started several processes, but training does not start "
            f"by MPI; start it by torchrun or `accelerate launch`, or unset {by_mpi} to train in this process alone"
        )
    several = world > 1 or "LOCAL_RANK" in given or ("RANK" in given) != ("WORLD_SIZE" in given)
    if several and missing:
        shown = ", ".join(f"{name}={given[name]}" for name in ADDRESS if name in given)
        raise UserError(f"{shown} in the environment, but no {' and no '.join(missing)}: {_way_out()}")
    if several and int(given["LOCAL_RANK"]) >= world:
        raise UserError(f"LOCAL_RANK={given['LOCAL_RANK']} in the environment, of WORLD_SIZE={world}: {_way_out()}")
    if several and int(given["MASTER_PORT"]) > 65535:
        raise UserError(f"MASTER_PORT={given['MASTER_PORT']} in the environment: expected a port; {_way_out()}")


def _way_out() -> str:
    return (
        f"training processes need {', '.join(ADDRESS[:-1])} and {ADDRESS[-1]}, as torchrun and `accelerate launch` set "
        "them; start it by one of these, or unset all of them to train in this process alone"
    )
