"""Time the answers of `fmdistill serve` to a moving pointer, over HTTP: from the request to the last byte of the masks.

    OMP_NUM_THREADS=1 python benchmarks/serve.py

Serves the student of recipes/demo/sam_mse.yaml, untrained, beside sam_mini, on a photograph that ships with
scikit-image; asks for the masks of `points` points one after the other. `run=RUN` takes a run of yours instead. Prints
a markdown table: the processor time of an answer, in which the client's share is small, and the time that passed.
"""

import http.client
import json
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import uvicorn

from fmdistill import recipe as recipes
from fmdistill.distill import checkpoint, student
from fmdistill.serve import app, bind_address, subjects


def untrained(folder: str) -> str:
    """Write a run whose student was not trained and whose cache does not exist, so that it takes the teacher itself."""
    recipe = recipes.load("recipes/demo/sam_mse.yaml", [f"out={folder}", f"cache.root={folder}/none"])
    torch.manual_seed(0)
    recipes.save(recipe, folder)
    checkpoint.save_state(student.build(recipe.student).state_dict(), Path(folder) / student.WEIGHTS)
    return folder


def serve(run: str) -> tuple[uvicorn.Server, int]:
    """Serve the run in a thread; return the server and its port."""
    listening = bind_address("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app.build(subjects.open_runs([run])), log_level="warning"))
    threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True).start()
    return server, listening.getsockname()[1]


def measure(port: int, names: Sequence[str], points: int) -> np.ndarray:
    """Return the milliseconds of each answer, (points, 2): of the processor, and passed; the first is not counted."""
    connection = http.client.HTTPConnection("127.0.0.1", port)

    def post(path: str, content: object = None) -> dict:
        connection.request("POST", path, json.dumps(content))
        return json.loads(connection.getresponse().read())

    image = post("/api/samples/0")["image"]
    for name in names:
        post(f"/api/images/{image}/embedding?subject={name}")
    times = []
    for x, y in np.random.default_rng(0).uniform(size=(points + 1, 2)).tolist():
        start = time.process_time(), time.perf_counter()
        answer = post(f"/api/images/{image}/masks", {"points": [[x, y, 1]]})
        times.append((1000 * (time.process_time() - start[0]), 1000 * (time.perf_counter() - start[1])))
        assert len(answer["masks"]) == len(names)
    return np.array(times[1:])


def main() -> None:
    """Serve, measure and print the table."""
    settings = dict(argument.split("=", 1) for argument in sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        run = settings.get("run") or untrained(str(Path(folder) / "student"))
        server, port = serve(run)
        times = measure(port, ["teacher", Path(run).name], int(settings.get("points", 200)))
        server.should_exit = True
    print(f"teacher and {Path(run).name}, {len(times)} points\n\n| ms | least | median | 95 % |\n|---|---|---|---|")
    for name, values in zip(("of the processor", "passed"), times.T, strict=True):
        print(f"| {name} | {' | '.join(f'{value:.1f}' for value in np.quantile(values, [0, 0.5, 0.95]))} |")


if __name__ == "__main__":
    main()
