#!/usr/bin/python3
# SPDX-License-Identifier: GPL-3.0-or-later
"""Checks the house rules that need no compiler: text_lint.py [--self-test] [FILE...]

Without files: all that git knows or would add (all files below . where there is no git). Reports
'file:line: rule: what'. A line may hold '/* lint: allow RULE */' (or '# lint: allow RULE') with its
reason beside it. Exit 0 clean, 1 findings.
"""

import ast
import os
import re
import subprocess
import sys
import tempfile

C = (".c", ".h", ".S")
LINES_MAX = 900
COLUMNS_MAX = 120  # make format holds code to 100; comments and strings may stick out a little
TAB = 8

# In parts, so that this file does not find itself.
MARKERS = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X|HA" r"CK|[Nn]ot impl" r"emented|[Ff]or n" r"ow)\b")
# Unbounded, not reentrant, or silent about bad input.
BANNED = re.compile(r"(?<![\w.>])(strcpy|strcat|sprintf|vsprintf|gets|strtok|alloca|atoi|atol|"
                    r"atoll|atof|system|setjmp|longjmp)\s*\(")
SPDX = "SPDX-License-Identifier: GPL-3.0-or-later"


def is_source(path, first_line):
    name = os.path.basename(path)
    return (path.endswith(C + (".py", ".sh", ".mk")) or first_line.startswith("#!")
            or name in ("Makefile", "Dockerfile"))


def without_strings(line):
    """A C line whose string and character literals are blanked."""
    return re.sub(r'"(\\.|[^"\\])*"|\'(\\.|[^\'\\])*\'', '""', line)


def code_lines(lines):
    """C lines without comments and strings, one for one."""
    inside = False
    for line in lines:
        out, rest = "", line if inside else without_strings(line)
        while rest:
            if inside:
                _, found, rest = rest.partition("*/")
                inside = not found
            else:
                before, found, rest = rest.partition("/*")
                out += before
                inside = bool(found)
        yield out.partition("//")[0]


def check_c(path, lines):
    for n, line in enumerate(lines, 1):
        indent = line[:len(line) - len(line.lstrip())]
        if " \t" in indent or " " * TAB in indent:
            yield n, "tabs", "indentation mixes spaces and tabs; 8-wide tabs"
        if len(line.expandtabs(TAB)) > COLUMNS_MAX:
            yield n, "columns", f"more than {COLUMNS_MAX} columns"
    if "cmocka.h" in "".join(lines):
        return  # cmocka itself demands setjmp.h and its macros
    for n, line in enumerate(code_lines(lines), 1):
        found = BANNED.search(line)
        if found:
            yield n, "banned", f"{found.group(1)}()"


def check(path):
    """Findings of one file, as (line, rule, text)."""
    with open(path, "rb") as f:
        raw = f.read()
    if b"\0" in raw:
        return  # a corpus entry, an image
    lines = raw.decode(errors="replace").splitlines()
    if not is_source(path, lines[0] if lines else ""):
        return
    if not any(SPDX in line for line in lines[:3]):
        yield 1, "spdx", f"no '{SPDX}' in the first three lines"
    if len(lines) > LINES_MAX:
        yield LINES_MAX, "size", f"{len(lines)} lines; split above {LINES_MAX}"
    if raw and not raw.endswith(b"\n"):
        yield len(lines), "newline", "no newline at the end"
    for n, line in enumerate(lines, 1):
        if MARKERS.search(line):
            yield n, "marker", line.strip()
        if line != line.rstrip():
            yield n, "blank", "blanks at the end of the line"
    if path.endswith(C):
        yield from check_c(path, lines)
    first = lines[0] if lines else ""
    if path.endswith(".py") or "python" in first:
        try:
            ast.parse(raw)
        except SyntaxError as e:
            yield e.lineno or 1, "syntax", str(e)
    elif first.startswith("#!") and re.search(r"\b(ba)?sh\b", first):
        shell = "bash" if "bash" in first else "sh"
        done = subprocess.run([shell, "-n", path], capture_output=True, text=True)
        if done.returncode:
            yield 1, "syntax", done.stderr.strip()


def lint(paths):
    findings = []
    for path in paths:
        if not os.path.isfile(path) or os.path.islink(path):
            continue
        with open(path, errors="replace") as f:
            lines = f.read().splitlines()
        for n, rule, text in check(path):
            if n <= len(lines) and f"lint: allow {rule}" in lines[n - 1]:
                continue
            findings.append((path, n, rule, text))
    return findings


def project_files():
    git = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], capture_output=True,
                         text=True)
    if git.returncode == 0:
        return git.stdout.splitlines()
    found = []
    for folder, folders, names in os.walk("."):
        folders[:] = [d for d in folders if d not in (".git", "build", "demo", "__pycache__")]
        found += [os.path.relpath(os.path.join(folder, n)) for n in names]
    return sorted(found)


def shell_scripts():
    """What shellcheck can judge: sh, dash and bash, not busybox."""
    for path in project_files():
        if os.path.isfile(path):
            with open(path, errors="replace") as f:
                if re.match(r"^#!(/usr)?/bin/(env )?(ba|da)?sh\b", f.readline(100)):
                    yield path


def self_test():
    """Each rule must fire on its bad file, and none on the good one."""
    spdx = f"/* {SPDX} */\n"
    sh = f"#!/bin/sh\n# {SPDX}\n"
    bad = {
        "spdx.c": ("spdx", "int x;\n"),
        "size.h": ("size", spdx + "\n" * LINES_MAX),
        "newline.c": ("newline", spdx + "int x;"),
        "marker.c": ("marker", spdx + "/* TO" "DO: later */\n"),
        "marker.sh": ("marker", sh + "# not impl" "emented\n"),
        "blank.c": ("blank", spdx + "int x; \n"),
        "tabs.c": ("tabs", spdx + "void f(void)\n{\n        g();\n}\n"),
        "columns.c": ("columns", spdx + "int " + "x" * 140 + ";\n"),
        "banned.c": ("banned", spdx + "void f(char *a, char *b)\n{\n\tstrcpy(a, b);\n}\n"),
        "syntax.py": ("syntax", f"# {SPDX}\ndef f(:\n"),
        "syntax.sh": ("syntax", sh + "if true; then\n"),
        "syntax_bash": ("syntax", "#!/usr/bin/env bash\n" + f"# {SPDX}\n" + "case x in\n"),
    }
    good = {
        "good.c": spdx + "/* no strcpy() here:\n * atoi() */\nint x; /* mkstemp(\"/tmp/a"
                  "XX" "XX" "XX\") */\nconst char *s = \"system(\";\nint y = my_atoi(1) + o->gets(2);\n",
        "allowed.c": spdx + "int y = atoi(z); /* lint: allow banned - z is ours */\n",
        "good.sh": sh + "mktemp -d /tmp/a." + "X" * 6 + "\n",
    }
    rc = 0
    with tempfile.TemporaryDirectory() as tmp:
        for name, text in {**{n: t for n, (_, t) in bad.items()}, **good}.items():
            path = os.path.join(tmp, name)
            with open(path, "w") as f:
                f.write(text)
            rules = {rule for _, _, rule, _ in lint([path])}
            want = {bad[name][0]} if name in bad else set()
            if rules != want:
                print(f"text_lint self-test: {name}: want {want or 'nothing'}, got {rules or 'nothing'}")
                rc = 1
    return rc


def main():
    if sys.argv[1:2] == ["--self-test"]:
        return self_test()
    if sys.argv[1:2] == ["--shell-scripts"]:
        print("\n".join(shell_scripts()))
        return 0
    findings = lint(sys.argv[1:] or project_files())
    for path, n, rule, text in findings:
        print(f"{path}:{n}: {rule}: {text}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
