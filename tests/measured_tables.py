"""Tables of measurements in Markdown: each stands below the command that prints it from result files, as `<!-- command -->`."""
import importlib
import re
import shlex


def marks(text):
    return re.findall(r"^<!-- (python -m bench.*) -->$", text, flags=re.M)


def squeezed(table):
    return re.sub(r"-+(?=\|)", "---", re.sub(r" +", " ", table))


def check_table(text, mark, capsys):
    """The table below `<!-- mark -->` is exactly what the command prints; the working directory is the project's."""
    module, *arguments = shlex.split(mark)[2:]
    assert module.startswith("bench.") and "--table" in arguments
    importlib.import_module(module).main(arguments)
    printed = capsys.readouterr().out.strip()
    table = text[text.index(mark) + len(mark):].split("-->", 1)[1].split("\n\n")[0]
    assert squeezed(table.strip()) == squeezed(printed) and printed.startswith("| ")
