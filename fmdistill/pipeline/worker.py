"""The process that `side_by_side` starts: it trains the recipes that it reads from its input, a line of JSON each.

For each it answers with a line: done, or the error as a JSON text. All else that it prints goes to the log of the run.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import TextIO

from fmdistill import distill, logs, pipeline, recipe, stop
from fmdistill.pipeline.side_by_side import LOG
from fmdistill.registry import UserError


def main() -> None:
    """Train and evaluate until the input ends, an error occurs, or a stop is requested."""
    stop.listen()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    logs.setup()
    for line in sys.stdin:
        if not _work(json.loads(line), answers):
            break


def _work(order: dict, answers: TextIO) -> bool:
    """Train one recipe, and return whether it succeeded."""
    settings = recipe.freeze(order["recipe"], order["recipe"]["out"])
    _print_to(Path(settings.out) / LOG)
    try:
        distill.run(settings)
        if order["evaluate"]:
            pipeline.evaluate_parts(settings)
        answers.write("done\n")
        return True
    except stop.Stopped:
        reason = "stopped"
        print(reason, file=sys.stderr)
    except (UserError, OSError) as error:
        reason = str(error)
        print(reason, file=sys.stderr)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        traceback.print_exc()
    answers.write(json.dumps(reason) + "\n")
    return False


def _print_to(path: Path) -> None:
    """Send what this process prints to the end of a file, the libraries' own output too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())


if __name__ == "__main__":
    main()
