"""``icd completion``: a completion script, made from the parsers of the commands."""

from __future__ import annotations

import argparse

from icd_tvm.arguments import Parser
from icd_tvm.cli import COMMANDS, load_command

_SCRIPT = """\
_icd() {{
    local cur="${{COMP_WORDS[COMP_CWORD]}}" prev="${{COMP_WORDS[COMP_CWORD-1]}}" words=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{commands} --help --version" -- "$cur"))
        return
    fi
    case "${{COMP_WORDS[1]}} $prev" in
{choices}
    esac
    if [ -z "$words" ]; then
        case "${{COMP_WORDS[1]}}" in
{options}
        esac
        case "$cur" in
            -*) ;;
            *) COMPREPLY=($(compgen -f -- "$cur")); return ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
}}
complete -o filenames -F _icd icd
"""


def parser() -> Parser:
    """Return the argument parser of the command."""
    result = Parser(
        prog="icd completion",
        description="Print a completion script.",
        examples='  eval "$(icd completion bash)"\n  eval "$(icd completion zsh)"\n',
    )
    result.add_argument("shell", choices=("bash", "zsh"))
    result.add_common("has no effect")
    return result


def run(arguments: argparse.Namespace) -> None:
    """Print the script; zsh runs bash's."""
    zsh = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"
    print((zsh if arguments.shell == "zsh" else "") + script(), end="")


def script() -> str:
    """Return the bash script: commands, their flags, and the values of flags that have few."""
    options, choices = [], []
    for command in COMMANDS:
        actions = load_command(command).parser()._actions
        flags = " ".join(flag for action in actions for flag in action.option_strings)
        options.append(f'            {command}) words="{flags}" ;;')
        for action in actions:
            values = " ".join(map(str, action.choices or ()))
            # A positional argument follows the command itself.
            for flag in action.option_strings or [command]:
                if values:
                    choices.append(f'        "{command} {flag}") words="{values}" ;;')
    return _SCRIPT.format(
        commands=" ".join(COMMANDS), options="\n".join(options), choices="\n".join(choices)
    )
