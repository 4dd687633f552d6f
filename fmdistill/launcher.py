"""Read the variables by which a launcher (torchrun, `accelerate launch`, MPI) describes its processes."""

import os

from fmdistill.registry import UserError

# Set by torchrun and `accelerate launch`; PyTorch needs them to connect several training processes.
ADDRESS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # accelerate also reads these


def processes() -> tuple[int, int]:
    """Return this process's rank and the number of processes that a launcher started; (0, 1) without a launcher.

    Caching needs only these: its processes share a folder, and none waits for another.
    """
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise UserError(
            f"RANK={rank}, WORLD_SIZE={world} in the environment: expected this process's rank, counted from 0, and "
            "the number of processes, as a launcher sets them; unset both to run one process"
        )
    return int(rank), int(world)


def local_rank() -> int | None:
    """Return this process's rank among those of its machine; None without a launcher."""
    rank = os.environ.get("LOCAL_RANK", "")
    if rank in ("", "-1"):  # PyTorch's and accelerate's values for "no launcher"
        return None
    if not rank.isdecimal():
        raise UserError(f"LOCAL_RANK='{rank}' in the environment: expected a number, 0 or more; or unset it")
    return int(rank)


def check_training() -> None:
    """Check the launcher's variables for training. Raises UserError if some are missing or wrong."""
    variables = {name: os.environ[name] for name in (*ADDRESS, *NUMBERS, *MPI) if name in os.environ}
    if local_rank() is None:
        variables.pop("LOCAL_RANK", None)
    for name in (*NUMBERS, *MPI):
        if name in variables and not variables[name].isdecimal():
            raise UserError(
                f"{name}='{variables[name]}' in the environment: expected a number, 0 or more; {_way_out()}"
            )
    _, world = processes()
    missing = [name for name in ADDRESS if not variables.get(name)]
    by_mpi = next((name for name in MPI if int(variables.get(name, "1")) > 1), None)
    if by_mpi and missing:
        raise UserError(
            f"{by_mpi}={variables[by_mpi]} in the environment: MPI started several processes, but training does not "
            f"support MPI; start it with torchrun or `accelerate launch`, or unset {by_mpi} to train in one process"
        )
    several = world > 1 or "LOCAL_RANK" in variables or ("RANK" in variables) != ("WORLD_SIZE" in variables)
    if several and missing:
        present = ", ".join(f"{name}={variables[name]}" for name in ADDRESS if name in variables)
        raise UserError(f"{present} in the environment, but no {' and no '.join(missing)}: {_way_out()}")
    if several and int(variables["LOCAL_RANK"]) >= world:
        local, largest = variables["LOCAL_RANK"], world - 1
        raise UserError(
            f"LOCAL_RANK={local}, WORLD_SIZE={world} in the environment: expected at most {largest}; {_way_out()}"
        )
    if several and int(variables["MASTER_PORT"]) > 65535:
        raise UserError(f"MASTER_PORT={variables['MASTER_PORT']} in the environment: expected a port; {_way_out()}")


def _way_out() -> str:
    return (
        f"training processes need {', '.join(ADDRESS[:-1])} and {ADDRESS[-1]}, as torchrun and `accelerate launch` set "
        "them; start training with one of these, or unset all of them to train in one process"
    )
