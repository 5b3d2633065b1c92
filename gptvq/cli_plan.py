"""`gptvq verify`: commands about a checkpoint that load no model."""
from __future__ import annotations


def add(commands, command) -> None:
    """Registers the commands of this file with the subparsers; `command` makes one."""
    p = command(commands, verify, "prove a packed checkpoint whole, without loading the model",
                "examples:\n  gptvq verify out\n  gptvq verify out --no-hashes --json -")
    p.add_argument("folder", metavar="FOLDER", help="folder written by `gptvq quantize`")
    p.add_argument("--no-hashes", action="store_true", help="check structure and ranges only, without reading all bytes")
    p.add_argument("--json", metavar="FILE", help="write the result here instead of printing it; - for standard output")


def verify(args):
    import dataclasses

    from .cli import write_json
    from .report import size
    from .verify import verify as run
    found = run(args.folder, hashes=not args.no_hashes)
    if args.json:
        write_json(args.json, dataclasses.asdict(found))
        return
    hashed = f"hashes of {' and '.join(found.hashed)} are right" if found.hashed else "no hashes were compared"
    print(f"{args.folder}: {found.layers} packed layers, {found.tensors} tensors, {size(found.nbytes)} in {found.files} "
          f"file{'s' * (found.files > 1)}: whole; {hashed}")
