"""Answer the page's requests: images are opened and embedded once, then every prompt costs only the decoder."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from fmdistill.backbones.clip import TextHead
from fmdistill.evaluate.results import TEACHER
from fmdistill.export.web import PAGE
from fmdistill.registry import UserError
from fmdistill.serve import masks, samples, scores, weights
from fmdistill.serve.guard import Guard
from fmdistill.serve.pictures import OpenImage, Pictures, UnknownImage
from fmdistill.serve.subjects import OpenedRuns, Subject

UPLOAD = 20_000_000  # bytes of an image
REQUEST = 200_000  # bytes of a prompt
FOLDER = Path(__file__).parent / "page"
FILES = {
    "": FOLDER / "index.html",
    "page.js": FOLDER / "page.js",
    "page.css": FOLDER / "page.css",
    # what this page has in common with the exported one
    "base.css": PAGE / "base.css",
    "pointing.js": PAGE / "pointing.js",
}
IN_MEMORY = "this image is no longer in memory; open it again"


def build(opened: OpenedRuns, host: str = "127.0.0.1") -> Starlette:
    """Return the application that serves the page and answers its requests, to be reached at the address `host`."""
    site = Site(opened, Pictures(opened), samples.gather(opened))
    routes = [Route(f"/{path}", functools.partial(_file, file)) for path, file in FILES.items()]
    routes += [
        Route("/api/session", site.session),
        Route("/api/samples/{number:int}", site.thumbnail),
        Route("/api/images", site.upload, methods=["POST"]),
        Route("/api/samples/{number:int}", site.open_sample, methods=["POST"]),
        Route("/api/images/{key}/picture", site.picture),
        Route("/api/images/{key}/embedding", site.embed, methods=["POST"]),
        Route("/api/images/{key}/weights", site.weigh),
        Route("/api/images/{key}/masks", site.predict, methods=["POST"]),
        Route("/api/images/{key}/scores", site.score, methods=["POST"]),
    ]
    handlers: Mapping[Any, Callable] = {
        UserError: lambda request, error: _error(str(error), 400),
        UnknownImage: lambda request, error: _error(IN_MEMORY, 410),
        HTTPException: lambda request, error: _error(error.detail, error.status_code),
        Exception: lambda request, error: _error(f"{type(error).__name__}: {error}", 500),
    }
    return Starlette(routes=routes, exception_handlers=handlers, middleware=[Middleware(Guard, host=host)])


@dataclass(frozen=True)
class Site:
    """The handlers of the page's requests, and the data that they share."""

    opened: OpenedRuns
    pictures: Pictures
    offered: list[samples.OfferedImage]

    @functools.cached_property
    def texts(self) -> scores.TextEmbeddings:
        """The text embeddings of the labels typed last."""
        return scores.TextEmbeddings(self.opened)

    def session(self, request: Request) -> Response:
        """Describe the networks, the samples and the limits."""
        opened = self.opened
        names, prompts = scores.of_protocols(opened.recipe) if opened.family == "clip" else ([], [])
        return JSONResponse(
            {
                "kind": "scores" if isinstance(opened.head, TextHead) else "masks",
                "subjects": [_subject(subject) for subject in opened.subjects.values()],
                "samples": [_offered(sample, names) for sample in self.offered],
                "templates": prompts,
                "upload": UPLOAD,
            }
        )

    def thumbnail(self, request: Request) -> Response:
        """Return a sample as a small JPEG."""
        data = samples.thumbnail(self._sample(request).read())
        return Response(data, media_type="image/jpeg", headers={"Cache-Control": "max-age=3600"})

    def open_sample(self, request: Request) -> Response:
        """Open a sample."""
        sample = self._sample(request)
        return _described(self.pictures.open(sample.read(), sample.name, sample.place))

    async def upload(self, request: Request) -> Response:
        """Open the image in the request's body, of at most UPLOAD bytes; `name` is its file's."""
        data = await _body(request, UPLOAD, f"the image is larger than {UPLOAD // 1_000_000} MB; make it smaller")
        if not data:
            raise UserError("the image is empty; choose a JPEG, PNG, WebP or TIFF file")
        name = request.query_params.get("name", "")[:200] or "image"
        return _described(await run_in_threadpool(self.pictures.open, data, name))

    def picture(self, request: Request) -> Response:
        """Return an open image as the page shows it."""
        return Response(self._image(request).jpeg, media_type="image/jpeg", headers={"Cache-Control": "max-age=3600"})

    def embed(self, request: Request) -> Response:
        """Compute a network's embedding of an image, unless that was done."""
        subject = request.query_params.get("subject", "")
        if subject not in self.opened.subjects:
            raise UserError(f"subject={subject}: none of {', '.join(self.opened.subjects)}")
        made = self.pictures.embedding(self._image(request), subject)
        return JSONResponse({"milliseconds": made.milliseconds})

    def weigh(self, request: Request) -> Response:
        """Return SRW's weights of the image's patches."""
        if isinstance(self.opened.head, TextHead):
            raise UserError("weights: SRW weighs whole images for a CLIP, not their patches")
        image = self._image(request)
        embedding = self.pictures.embedding(image, TEACHER).embedding
        return JSONResponse(weights.weight_map(self.opened, image, embedding))

    async def predict(self, request: Request) -> Response:
        """Return the masks of a prompt from every embedding that has been computed."""
        stated = await _json(request)
        return await run_in_threadpool(self._masks, self._image(request), stated)

    async def score(self, request: Request) -> Response:
        """Return the scores of labels by every embedding that has been computed."""
        stated = await _json(request)
        return await run_in_threadpool(self._scores, self._image(request), stated)

    def _masks(self, image: OpenImage, stated: Any) -> Response:
        if isinstance(self.opened.head, TextHead):
            raise UserError("masks: the runs' teacher is a CLIP, which makes none")
        prompt = masks.MaskPrompt.from_json(stated)
        made = {name: image.embeddings[name] for name in self.opened.subjects if name in image.embeddings}
        predictions = {
            name: masks.predict(self.opened, image, each.embedding, prompt, self.opened.subjects[name].head)
            for name, each in made.items()
        }
        return JSONResponse({"size": image.shown, "masks": masks.compare(predictions)})

    def _scores(self, image: OpenImage, stated: Any) -> Response:
        if not isinstance(self.opened.head, TextHead):
            raise UserError("scores: the runs' teacher is a SAM, which has no texts")
        wording = scores.Wording.from_json(stated)
        text_DK, scale = self.texts.of(wording), self.opened.head.scale
        made = {name: image.embeddings[name] for name in self.opened.subjects if name in image.embeddings}
        rows = [{"subject": name, **scores.score(each.embedding, text_DK, scale)} for name, each in made.items()]
        return JSONResponse({"labels": wording.labels, "scores": rows})

    def _image(self, request: Request) -> OpenImage:
        return self.pictures.get(request.path_params["key"])

    def _sample(self, request: Request) -> samples.OfferedImage:
        number = request.path_params["number"]
        if number >= len(self.offered):
            raise HTTPException(404, f"sample {number}: there are {len(self.offered)}")
        return self.offered[number]


def _file(file: Path, request: Request) -> Response:
    return FileResponse(file, headers={"Cache-Control": "no-cache"})


def _subject(subject: Subject) -> dict[str, Any]:
    fields = {name: getattr(subject, name) for name in ("name", "title", "parameters", "problem")}
    return {**fields, "teacher": subject.name == TEACHER}


def _offered(sample: samples.OfferedImage, names: Sequence[str]) -> dict[str, Any]:
    label = names[sample.label] if sample.label is not None and 0 <= sample.label < len(names) else None
    return {"name": sample.name, "group": sample.group, "label": label}


def _described(image: OpenImage) -> Response:
    return JSONResponse({"image": image.key, "name": image.name, "shown": image.shown, "original": image.original})


def _error(message: str, status: int) -> Response:
    return JSONResponse({"error": message}, status_code=status)


async def _json(request: Request) -> Any:
    data = await _body(request, REQUEST, "the request is too large")
    try:
        return json.loads(data)
    except ValueError:
        raise UserError("the request is not JSON") from None


async def _body(request: Request, most: int, message: str) -> bytes:
    """Return the request's body, which is not read further than `most` bytes."""
    stated = request.headers.get("content-length", "")
    if stated.isdigit() and int(stated) > most:
        raise HTTPException(413, message)
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > most:
            raise HTTPException(413, message)
    return bytes(data)
