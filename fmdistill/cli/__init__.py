"""The command line: a verb, a recipe, and key=value overrides. The only flags are `compare --seeds N --jobs N`."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from fmdistill import __version__, stop
from fmdistill.cli import describe, failures

EPILOG = """A recipe is looked up in the working folder first, then in the package. Settings are changed with key=value,
such as train.steps=1000; changing a component's name (teacher.name=sam_mini) removes its other settings. A recipe's
name may contain settings too, RECIPE:key=value,key=value; its run then has its own folder. recipes/studies/digits:kd is
a method of a study.
Ctrl-C and SIGTERM stop between two steps, and the same command continues. In a container, docker run --ipc=host gives
the processes that load images the shared memory that they need; without it, threads load them.
FMDISTILL_TRACEBACK=1 in the environment prints the traceback of an error."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, without importing anything slow."""
    top = argparse.ArgumentParser(prog="fmdistill", description=__doc__, epilog=EPILOG)
    top.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, about: str, *arguments: tuple[str, str, str | None]) -> None:
        subparser = verbs.add_parser(name, help=about, description=about, epilog=EPILOG)
        for argument, meaning, count in arguments:
            subparser.add_argument(argument, help=meaning, nargs=count, metavar=argument.upper())

    recipe = ("recipe", "a recipe's path, such as recipes/demo/sam_srw.yaml", None)
    overrides = ("overrides", "settings as key=value", "*")
    verb("init", "write a recipe for your own images, sized to them and to this machine; without arguments it asks",
         ("arguments", "FILE, then sam, clip or timm, and settings such as images.root=FOLDER and teacher.weights=FILE",
          "*"))  # fmt: skip
    verb("run", "cache, distil and evaluate", recipe, overrides)
    verb("compare", "run recipes, or all methods of a study, over the same seeds and write one paired table",
         ("recipes", "STUDY, STUDY:METHOD, RECIPE or RECIPE:key=value,key=value, the first is the baseline; and "
          "settings of all as key=value (out=FOLDER is the folder of all runs and the table)", "+"))  # fmt: skip
    verbs.choices["compare"].add_argument("--seeds", type=int, default=8, help="how many seeds, from 0 on (8)")
    verbs.choices["compare"].add_argument(
        "--jobs",
        type=int,
        default=1,
        help="how many runs at the same time, each with its GPU or share of the cores (1)",
    )
    verb("plan", "estimate a recipe's images, bytes and hours from a few images, before the work begins", recipe,
         ("overrides", "settings as key=value; those of the plan are plan.images, plan.steps, plan.gpus=[1,8]", "*")
         )  # fmt: skip
    verb("bench", "measure the parts of a recipe's teacher pass and its training steps, compared with plain loops",
         recipe, ("overrides", "settings as key=value; those of the bench are bench.images, .rounds, .megabytes, "
                  ".steps, .weights=random", "*"))  # fmt: skip
    verb("cache", "run the teacher over the images that are not cached yet", recipe, overrides)
    verb("verify", "check every checksum of a cache, then recompute a sample", recipe, overrides)
    verb("inspect", "describe a shard of a cache, check its bytes, and show the weights that SRW gives it",
         ("shard", "CACHE/NAME.tar, its .json, or CACHE/NAME", None),
         ("settings", "key=, output=, temperature=, relative=, and out=FILE.png for the picture", "*"))  # fmt: skip
    verb("distill", "train the student from the cache, or continue its training", recipe, overrides)
    verb("evaluate", "evaluate a run or checkpoint by a protocol, or a recipe's run by its own protocols",
         ("protocol", "a protocol's path, or a recipe's", None),
         ("subject", "a run's or exported folder, or a checkpoint file, and settings as key=value", "*"))  # fmt: skip
    verb("weigh", "write {image key: weight} for the weighting by_key, from a trained PAD or from IPWD's two stages",
         ("kind", "pad (of a RUN), or ipwd (of a distilled RUN and a LABEL_RUN trained only from labels)", None),
         ("arguments", "RUN [LABEL_RUN] OUT, the file to write, and trust=true if a run names code outside fmdistill",
          "+"))  # fmt: skip
    _add_sharing(verb)
    verb("check", "check every setting without touching data; without names, of all recipes in the package",
         ("paths", "recipes, studies and protocols, and settings of each recipe as key=value", "*"))  # fmt: skip
    verb("show", "print a recipe with all that it extends and every default", recipe, overrides)
    verb("list", "list recipes, studies, protocols and components, one a line",
         ("what", "recipes, studies, protocols, components, or one kind of them, such as teachers", "*"))  # fmt: skip
    verb("students", "list students with their parameters and multiply-adds (MACs)",
         ("patterns", "names of timm's models, * stands for any characters, such as 'repvit*'", "*"))  # fmt: skip
    verb("explain", "say what a component, a setting or a recipe is, with its settings, types and defaults",
         ("name", "such as teacher.sam_vit_h, teacher, weighting.srw, train, or a recipe", None))  # fmt: skip
    verb("demo", "run a small distillation of an embedded teacher",
         ("overrides", "sam or clip; settings as key=value", "*"))  # fmt: skip
    return top


def _add_sharing(verb: Callable[..., None]) -> None:
    """Add the verbs that show or give a finished run to others."""
    verb("export", "write a finished run for other software", ("run", "a run's folder", None),
         ("format", "such as mobilesam, openclip, timm or half; `fmdistill list exports` has all", None),
         ("out", "the file or folder to write", None),
         ("settings", "key=value of the format; trust=true if the run names code outside", "*"))  # fmt: skip
    verb("push", "upload an exported folder to the Hugging Face hub", ("folder", "an exported folder", None),
         ("repo", "OWNER/NAME on the hub", None), ("settings", "dry_run=true, private=true", "*"))  # fmt: skip
    verb("report", "write one HTML page about runs, and their tables as Markdown, LaTeX and CSV",
         ("out", "the page's folder", None),
         ("runs", "runs' folders, and settings: images=[FILE,FOLDER,KEY] to show, trust=true", "+"))  # fmt: skip
    verb("serve", "open a local page on which to click on images and see the masks or scores of teacher and students",
         ("runs", "runs' folders, and settings: port=, host=, device=, trust=true", "+"))  # fmt: skip


def _parsed(argv: Sequence[str] | None) -> dict:
    """Return the verb's arguments. Settings may follow a flag, which argparse alone does not support."""
    top = parser()
    arguments, rest = top.parse_known_args(argv)
    if rest and (arguments.verb != "compare" or any(argument.startswith("-") for argument in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.recipes += rest
    return vars(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb. Return 0; 2 after an error, printed in one line with the way out; 130 or 143 if stopped."""
    stop.listen()
    arguments = _parsed(argv)
    from fmdistill import logs
    from fmdistill.registry import UserError

    logs.setup()
    verb = arguments.pop("verb")
    try:
        VERBS[verb](**arguments)
        return 0
    except (KeyboardInterrupt, UserError, OSError, RuntimeError) as error:
        if (number := failures.stopped(error)) is not None:
            code, line = 128 + number, "stopped; the same command continues where it stopped"
        else:
            message = failures.machine(error, verb) if isinstance(error, RuntimeError) else failures.line(error)
            if message is None or os.environ.get("FMDISTILL_TRACEBACK"):
                raise
            code, line = 2, f"error: {message}"
    # Printed after the exception is freed and with it the progress bars, whose last state would follow the line.
    print(f"fmdistill: {line}", file=sys.stderr)
    return code


def _run(recipe: str, overrides: list[str]) -> None:
    from fmdistill import pipeline, report
    from fmdistill.recipe import load

    settings = load(recipe, overrides)
    pipeline.run(settings)
    if pipeline.is_main():
        print(report.text(pipeline.runs_of(settings)))


def _compare(recipes: list[str], seeds: int, jobs: int) -> None:
    from fmdistill.pipeline import compare
    from fmdistill.settings import is_override

    names = [argument for argument in recipes if not is_override(argument)]
    table = compare.run(names, seeds, [argument for argument in recipes if is_override(argument)], jobs)
    print(f"{table.read_text()}\n{table}")


def _plan(recipe: str, overrides: list[str]) -> None:
    from fmdistill.pipeline import plan, rehearsal
    from fmdistill.recipe import load
    from fmdistill.several import by_teacher

    settings, rest = rehearsal.verb_settings("plan", plan.PlanSettings, overrides)
    parts = by_teacher(load(recipe, rest))
    for name, part in parts.items():
        print(plan.text(plan.run(part, settings), f"{recipe}, teacher {name}" if name else recipe))
    if len(parts) > 1:
        print(f"\nA step of the run does the steps of all {len(parts)} teachers: add their times.")


def _bench(recipe: str, overrides: list[str]) -> None:
    from fmdistill.pipeline import bench, rehearsal
    from fmdistill.recipe import load
    from fmdistill.several import by_teacher

    settings, rest = rehearsal.verb_settings("bench", bench.BenchSettings, overrides)
    for part in by_teacher(load(recipe, rest)).values():
        print(f"{bench.text(bench.run(part, settings))}\n\n{part.out}/bench.json")


def _cache(recipe: str, overrides: list[str]) -> None:
    from fmdistill.cache import finished
    from fmdistill.recipe import load
    from fmdistill.several import by_teacher

    settings = load(recipe, overrides)
    missing = [part for part in by_teacher(settings).values() if not finished.is_finished(part)]
    if not missing:
        return
    import fmdistill.cache as cache  # this and the next import torch, which takes seconds
    from fmdistill import pipeline

    pipeline.check_caching(settings)
    for part in missing:
        cache.run(part)


def _verify(recipe: str, overrides: list[str]) -> None:
    import fmdistill.cache as cache
    from fmdistill.recipe import load
    from fmdistill.several import by_teacher

    for teacher, part in by_teacher(load(recipe, overrides)).items():
        for name, value in cache.verify(part).items():
            print(f"{f'{teacher} {name}'.strip():24} {value:.6g}")


def _inspect(shard: str, settings: list[str]) -> None:
    from fmdistill.report import inspect

    for line in inspect.run(shard, settings):
        print(line)


def _distill(recipe: str, overrides: list[str]) -> None:
    from fmdistill import distill, pipeline
    from fmdistill.recipe import load

    settings = load(recipe, overrides)
    pipeline.check_before(settings)
    print(distill.run(settings))


def _evaluate(protocol: str, subject: list[str]) -> None:
    import fmdistill.evaluate as evaluate
    from fmdistill import pipeline
    from fmdistill.evaluate.results import text
    from fmdistill.recipe import load, locate, read_yaml
    from fmdistill.registry import UserError
    from fmdistill.settings import parse_recipe_name

    if subject and "=" not in subject[0]:
        results = {protocol: evaluate.run(protocol, subject[0], subject[1:])}
    elif "name" in read_yaml(locate(parse_recipe_name(protocol).path)):  # a protocol; a recipe has none
        raise UserError(f"{protocol}: a protocol needs a run to evaluate: fmdistill evaluate {protocol} RUN")
    else:
        results = pipeline.evaluate_recipe(load(protocol, subject))
    for name, rows in results.items():
        print(f"{name}\n{text(rows)}")


def _weigh(kind: str, arguments: list[str]) -> None:
    from fmdistill.distill import weigh
    from fmdistill.registry import UserError

    settings = [argument for argument in arguments if "=" in argument]
    paths = [argument for argument in arguments if argument not in settings]
    kinds = {("pad", 2): weigh.by_pad, ("ipwd", 3): weigh.by_propensity}
    if (kind, len(paths)) not in kinds:
        raise UserError(
            f"weigh {kind} with {len(paths)} paths: expected `weigh pad RUN OUT` or `weigh ipwd RUN LABEL_RUN OUT`"
        )
    print(kinds[kind, len(paths)](*paths, _trust(settings)))


def _export(run: str, format: str, out: str, settings: list[str]) -> None:
    import fmdistill.export as export
    from fmdistill.recipe import parse_overrides

    own = [setting for setting in settings if not setting.startswith("trust=")]
    trust = _trust([setting for setting in settings if setting not in own])
    print(export.run(run, format, out, trust, parse_overrides(own)))


def _push(folder: str, repo: str, settings: list[str]) -> None:
    import fmdistill.api as api
    from fmdistill.recipe import parse_overrides
    from fmdistill.registry import typed

    own = typed(api.push, parse_overrides(settings), "push", ("folder", "repo"))
    print("\n".join(api.push(folder, repo, **own)))


def _report(out: str, runs: list[str]) -> None:
    from fmdistill import report
    from fmdistill.recipe import parse_overrides
    from fmdistill.registry import typed
    from fmdistill.settings import is_override

    settings = parse_overrides(argument for argument in runs if is_override(argument))
    if not str(settings.get("images", "[")).startswith("["):  # a single one
        settings["images"] = [settings["images"]]
    own = typed(report.run, settings, "report", ("runs", "out"))
    print(report.run([argument for argument in runs if not is_override(argument)], out, **own))


def _serve(runs: list[str]) -> None:
    from fmdistill import serve

    serve.run(runs)


def _trust(settings: list[str]) -> bool:
    from fmdistill.registry import UserError

    for setting in settings:
        if setting not in ("trust=true", "trust=false"):
            raise UserError(f"'{setting}': the only setting of this verb is trust=true")
    return "trust=true" in settings


def _check(paths: list[str]) -> None:
    from fmdistill import pipeline
    from fmdistill.settings import is_override

    overrides = [argument for argument in paths if is_override(argument)]
    for name in pipeline.check_files([argument for argument in paths if not is_override(argument)], overrides):
        print(f"{name}: ok")


def _demo(overrides: list[str]) -> None:
    from fmdistill.pipeline import demo

    kind = overrides.pop(0) if overrides and "=" not in overrides[0] else "sam"
    demo.run(kind, overrides)


VERBS = {
    "init": describe.init,
    "run": _run,
    "compare": _compare,
    "plan": _plan,
    "bench": _bench,
    "cache": _cache,
    "verify": _verify,
    "inspect": _inspect,
    "distill": _distill,
    "evaluate": _evaluate,
    "weigh": _weigh,
    "export": _export,
    "push": _push,
    "report": _report,
    "serve": _serve,
    "check": _check,
    "show": describe.show,
    "list": describe.list_names,
    "students": describe.students,
    "explain": describe.explain,
    "demo": _demo,
}
