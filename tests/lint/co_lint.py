#!/usr/bin/python3
# SPDX-License-Identifier: GPL-3.0-or-later
"""Checks who may wait: co_lint.py [--self-test] [--cppflags FLAGS] FILE.c...

A function, function-pointer member, variable or parameter marked CO_FN (include/nbdrs/co.h) may
suspend its fiber. Clang sees the mark as an annotation; this walks its syntax tree and reports

1. a call of a CO_FN from a function that is not CO_FN;
2. a CO_FN put where its mark is lost: stored in, assigned to or passed as a function pointer that is
   not CO_FN itself, for whoever calls through that pointer would not know. Only the functions that
   start fibers take a CO_FN through a plain pointer (STARTERS). Not asked of tests/, where it is the harness
   that starts the fibers.

Exit 0 clean, 1 findings, 2 when a file cannot be parsed.
"""

import argparse
import concurrent.futures
import os
import shlex
import subprocess
import sys
import tempfile

try:
    from clang.cindex import CursorKind, Index
except ImportError:
    print("co_lint: python3-clang-14 is missing (make deps)")
    sys.exit(77)

# These run their function argument in a fiber of its own.
STARTERS = {"co_spawn", "co_group_spawn", "reactor_call", "reactor_call_blocking"}

DECLS = (CursorKind.FUNCTION_DECL, CursorKind.FIELD_DECL, CursorKind.VAR_DECL,
         CursorKind.PARM_DECL)


def resource_dir():
    """Where clang's own headers (stddef.h) are; libclang does not find them by itself."""
    for name in ("clang", "clang-14"):
        try:
            return subprocess.run([name, "-print-resource-dir"], check=True, text=True,
                                  capture_output=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            continue
    print("co_lint: clang is missing (make deps)")
    sys.exit(77)


def may_wait(decl):
    """Whether a declaration, or the first one of the same thing, is marked CO_FN."""
    for d in (decl, decl.canonical):
        for child in d.get_children():
            if child.kind == CursorKind.ANNOTATE_ATTR and child.spelling == "co_fn":
                return True
    return False


class FileLint:
    def __init__(self, path):
        self.path = path
        self.found = set()
        self.stores_count = not path.startswith("tests/")

    def report(self, cursor, text):
        loc = cursor.location
        name = loc.file.name if loc.file else self.path
        self.found.add((os.path.relpath(name), loc.line, text))

    def callee_of(self, call):
        """What a call calls: the declaration of its function, member, variable or parameter."""
        children = list(call.get_children())
        return self.pointed(children[0]) if children else None

    def pointed(self, expr):
        """The declaration an expression names as a function; None when it is not a plain name."""
        if expr.kind in (CursorKind.DECL_REF_EXPR, CursorKind.MEMBER_REF_EXPR):
            ref = expr.referenced
            return ref if ref is not None and ref.kind in DECLS else None
        if expr.kind in (CursorKind.UNEXPOSED_EXPR, CursorKind.PAREN_EXPR,
                         CursorKind.UNARY_OPERATOR, CursorKind.CSTYLE_CAST_EXPR):
            children = [c for c in expr.get_children() if c.kind.is_expression()]
            return self.pointed(children[-1]) if children else None
        return None

    def waiting_value(self, expr):
        """The CO_FN declaration that an expression has as its value, looking into `?:`."""
        if expr.kind == CursorKind.CONDITIONAL_OPERATOR:
            for arm in list(expr.get_children())[1:]:
                decl = self.waiting_value(arm)
                if decl is not None:
                    return decl
            return None
        decl = self.pointed(expr)
        return decl if decl is not None and may_wait(decl) else None

    def check_store(self, target, expr):
        """Rule 2 for `target = expr`."""
        decl = self.waiting_value(expr) if self.stores_count else None
        if decl is not None and not may_wait(target):
            self.report(expr, f"{decl.spelling}() is CO_FN, but {target.spelling} is not")

    def check_call(self, call, function):
        callee = self.callee_of(call)
        if callee is None:
            return
        if may_wait(callee) and not may_wait(function):
            self.report(call, f"{function.spelling}() is not CO_FN, but calls "
                              f"{callee.spelling}(), which is")
        if not self.stores_count or callee.spelling in STARTERS:
            return
        params = [c for c in callee.get_children() if c.kind == CursorKind.PARM_DECL]
        for i, arg in enumerate(call.get_arguments()):
            decl = self.waiting_value(arg) if arg is not None else None
            if decl is None or (i < len(params) and may_wait(params[i])):
                continue
            self.report(arg, f"{decl.spelling}() is CO_FN, but {callee.spelling}() takes it as "
                             "a plain function")

    def fields_of(self, init_type):
        return [f for f in init_type.get_canonical().get_fields()]

    def check_init(self, init):
        """Rule 2 for an initializer list of a struct, designated or in order."""
        fields = self.fields_of(init.type)
        for i, item in enumerate(init.get_children()):
            children = list(item.get_children())
            if children and children[0].kind == CursorKind.MEMBER_REF:
                field = children[0].referenced
                if len(children) > 1 and field is not None:
                    self.check_store(field, children[-1])
            elif i < len(fields):
                self.check_store(fields[i], item)

    def walk(self, cursor, function):
        kind = cursor.kind
        if kind == CursorKind.CALL_EXPR and function is not None:
            self.check_call(cursor, function)
        elif kind == CursorKind.INIT_LIST_EXPR:
            self.check_init(cursor)
        elif kind == CursorKind.VAR_DECL:
            exprs = [c for c in cursor.get_children() if c.kind.is_expression()]
            if exprs:
                self.check_store(cursor, exprs[-1])
        elif kind == CursorKind.BINARY_OPERATOR:
            sides = list(cursor.get_children())
            target = self.pointed(sides[0]) if len(sides) == 2 else None
            # Comparisons and the like have no side whose mark could be lost.
            if target is not None and target.kind != CursorKind.FUNCTION_DECL and is_assignment(
                    cursor, sides[0]):
                self.check_store(target, sides[1])
        for child in cursor.get_children():
            self.walk(child, function)

    def file(self, flags):
        tu = Index.create().parse(self.path, args=flags)
        errors = [d for d in tu.diagnostics if d.severity >= 3]
        if errors:
            return [f"{self.path}: cannot be parsed: {errors[0].spelling}"], []
        root = os.getcwd() + os.sep
        for top in tu.cursor.get_children():
            name = top.location.file.name if top.location.file else ""
            if not os.path.abspath(name).startswith(root):
                continue  # a system header
            self.walk(top, top if top.kind == CursorKind.FUNCTION_DECL else None)
        return [], sorted(self.found)


def is_assignment(cursor, left):
    """Whether a binary operator is `=`; libclang 14 tells only by the token after the left side."""
    end = left.extent.end.offset
    for token in cursor.get_tokens():
        if token.extent.start.offset >= end:
            return token.spelling == "="
    return False


def lint_file(job):
    path, flags = job
    return FileLint(path).file(flags)


def lint(paths, flags):
    """(errors, findings) of all files."""
    errors, findings = [], set()
    with concurrent.futures.ProcessPoolExecutor() as pool:
        for e, f in pool.map(lint_file, [(p, flags) for p in paths]):
            errors += e
            findings.update(f)
    return errors, sorted(findings)


SELF_TEST = """
#define CO_FN __attribute__((annotate("co_fn")))
struct ops { CO_FN int (*read)(int); int (*plain)(int); };
CO_FN int waits(int);
CO_FN static int waits_too(int n) { return waits(n); }
CO_FN void fiber(void *arg);
void fiber(void *arg) { (void)arg; (void)waits_too(1); }
int co_spawn(void (*fn)(void *), void *arg);
int pool_call(void (*fn)(void *), void *arg);
int takes(CO_FN int (*fn)(int));
static const struct ops good = { .read = waits };
static struct ops bad_designated = { .plain = waits };          /* bad */
static struct ops bad_in_order = { waits, waits };              /* bad */
int starts(void);
int starts(void) { return co_spawn(fiber, 0) + takes(waits); }
int wrong_direct(void);
int wrong_direct(void) { return waits(1); }                     /* bad */
int wrong_member(const struct ops *o);
int wrong_member(const struct ops *o) { return o->read(1); }    /* bad */
int wrong_star(const struct ops *o);
int wrong_star(const struct ops *o) { return (*o->read)(1); }   /* bad */
int wrong_in_cond(int n);
int wrong_in_cond(int n) { return n && waits(n) ? 1 : 0; }      /* bad */
int wrong_argument(void);
int wrong_argument(void) { return pool_call(fiber, 0); }        /* bad */
void wrong_assignment(struct ops *o);
void wrong_assignment(struct ops *o) { o->plain = waits; }      /* bad */
int wrong_variable(void);
int wrong_variable(void) { int (*f)(int) = &waits; return f(1); } /* bad */
int wrong_choice(int n);
int wrong_choice(int n) { int (*f)(int) = n ? waits : 0; return f(1); } /* bad */
int compares(const struct ops *o);
int compares(const struct ops *o) { return o->plain == waits || o->read == waits; }
CO_FN int parameter(CO_FN int (*fn)(int));
int parameter(CO_FN int (*fn)(int)) { return fn(1); }
int wrong_parameter(CO_FN int (*fn)(int));
int wrong_parameter(CO_FN int (*fn)(int)) { return fn(1); }     /* bad */
int uses(void);
int uses(void) { return good.plain == 0 && bad_designated.plain && bad_in_order.plain; }
"""


def self_test(flags):
    """Each line marked bad must be found, and no other."""
    with tempfile.TemporaryDirectory() as tmp:
        path = os.path.join(tmp, "self_test.c")
        with open(path, "w") as f:
            f.write(SELF_TEST)
        here = os.getcwd()
        os.chdir(tmp)
        errors, findings = lint([path], flags)
        os.chdir(here)
    want = {n for n, s in enumerate(SELF_TEST.splitlines(), 1) if "/* bad */" in s}
    got = {line for _, line, _ in findings}
    for line in sorted(want ^ got):
        what = "missed" if line in want else "false alarm"
        print(f"co_lint self-test: {what} at line {line}: {SELF_TEST.splitlines()[line - 1]}")
    for e in errors:
        print(e)
    return 1 if errors or want != got else 0


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--self-test", action="store_true")
    p.add_argument("--cppflags", default="-Iinclude -Idaemon -Itool -D_GNU_SOURCE")
    p.add_argument("file", nargs="*")
    a = p.parse_args()
    flags = ["-std=gnu17", "-resource-dir", resource_dir(), *shlex.split(a.cppflags)]
    if a.self_test:
        return self_test(flags)
    errors, findings = lint(a.file, flags)
    for e in errors:
        print(e)
    for path, line, text in findings:
        print(f"{path}:{line}: {text}")
    return 2 if errors else 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
