"""Shell completion: a static script made from the command line's own parser, so that pressing Tab starts no Python."""
from __future__ import annotations

import argparse

SHELLS = ("bash", "zsh", "fish")


def script(top: argparse.ArgumentParser, shell: str) -> str:
    """What the shell has to read, for instance with `source <(gptvq completion bash)`."""
    commands = {name: p for action in top._actions if isinstance(action, argparse._SubParsersAction) for name, p in action.choices.items()}
    helps = {choice.dest: choice.help or "" for action in top._actions if isinstance(action, argparse._SubParsersAction)
             for choice in action._choices_actions}
    return _fish(commands, helps) if shell == "fish" else _bash(commands, zsh=shell == "zsh")


def _options(p: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in p._actions if action.option_strings]


def _choices(action: argparse.Action) -> list[str]:
    if action.dest == "preset":
        from .config import PRESETS
        return list(PRESETS)
    return [str(choice) for choice in action.choices or ()]


def _bash(commands: dict[str, argparse.ArgumentParser], zsh: bool) -> str:
    cases, values = [], []
    for name, p in commands.items():
        flags = " ".join(max(action.option_strings, key=len) for action in _options(p))
        words = " ".join(choice for action in p._actions if not action.option_strings for choice in _choices(action))
        cases.append(f'    {name}) flags="{flags}"; words="{words}" ;;')
        for action in _options(p):
            if _choices(action):
                flag, choices = max(action.option_strings, key=len), " ".join(_choices(action))
                values.append(f'    "{name} {flag}") COMPREPLY=($(compgen -W "{choices}" -- "$cur")); return ;;')
    lines = ["_gptvq() {", '  local cur="${COMP_WORDS[COMP_CWORD]}" prev="${COMP_WORDS[COMP_CWORD-1]}" flags="" words=""', "  COMPREPLY=()",
             '  if [ "$COMP_CWORD" -eq 1 ]; then',
             f'    COMPREPLY=($(compgen -W "{" ".join(commands)} --help --version" -- "$cur")); return', "  fi",
             '  case "${COMP_WORDS[1]} $prev" in', *values, "  esac", '  case "${COMP_WORDS[1]}" in', *cases, "  esac",
             '  case "$cur" in', '    -*) COMPREPLY=($(compgen -W "$flags" -- "$cur")) ;;',
             '    *) [ -n "$words" ] && COMPREPLY=($(compgen -W "$words" -- "$cur")) || COMPREPLY=($(compgen -f -- "$cur")) ;;',
             "  esac", "}",
             "complete -o filenames -F _gptvq gptvq"]
    head = ["autoload -U +X bashcompinit && bashcompinit"] if zsh else []
    return "\n".join([*head, *lines]) + "\n"


def _fish(commands: dict[str, argparse.ArgumentParser], helps: dict[str, str]) -> str:
    def quoted(text: str) -> str:
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"

    lines = [f"complete -c gptvq -n __fish_use_subcommand -f -a {name} -d {quoted(helps.get(name, ''))}" for name in commands]
    for name, p in commands.items():
        for action in _options(p):
            flag = max(action.option_strings, key=len).lstrip("-")
            choices = _choices(action)
            value = f" -x -a {quoted(' '.join(choices))}" if choices else " -r" if action.nargs != 0 else ""
            text = quoted((action.help or "").replace("%(default)s", str(action.default)).partition("; ")[0])
            lines.append(f"complete -c gptvq -n '__fish_seen_subcommand_from {name}' -l {flag}{value} -d {text}")
    return "\n".join(lines) + "\n"
