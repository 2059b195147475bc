"""The C code of the offline sample, as tasks: a handful of statements, and the orders in which they are right or wrong.

What separates the forms of a task is order or relation (a check before or after the use, `<` or `<=`, which pointer
is subtracted from which), hardly ever the words in it: a model that only counts words cannot tell them apart.
`$name` is a random identifier, type or number of that role; `@fail` leaves the function with an error.
"""

from __future__ import annotations

from dataclasses import dataclass

CWE_NAMES = ("CWE-119", "CWE-120", "CWE-469", "CWE-476", "other")


@dataclass(frozen=True)
class Task:
    """Something that C code does, in right and in wrong forms.

    Attributes:
        parameters: Parameters that the function needs for it.
        variables: Declarations that the function needs for it.
        statements: One letter to one statement.
        forms: Class (0 to 4) to the forms of that class, each the letters of its statements in order. Class 4 has the
            right forms, and wrong ones whose weakness is none of the other four.
    """

    parameters: tuple[str, ...]
    variables: tuple[str, ...]
    statements: dict[str, str]
    forms: dict[int, tuple[str, ...]]


ROLES: dict[str, tuple[str, ...]] = {
    "src": ("src", "input", "text"),
    "dst": ("dst", "buf", "out"),
    "tab": ("tab", "cells", "values"),
    "idx": ("i", "j", "pos"),
    "len": ("len", "n", "count"),
    "val": ("value", "v", "mode"),
    "ptr": ("p", "node", "item"),
    "hit": ("hit", "mark", "sep"),
    "begin": ("begin", "start", "first"),
    "end": ("end", "stop", "last"),
    "file": ("fp", "file", "stream"),
    "sum": ("sum", "total", "acc"),
}

CONSTANTS: dict[str, tuple[str, ...]] = {
    "member": ("id", "state", "width", "kind"),
    "struct": ("record", "session", "packet", "config"),
    "type": ("int", "long", "unsigned"),
    "N": ("32", "64", "100", "256"),
    "char": ("':'", "'/'", "'='", "','"),
    "small": ("2", "3", "5", "7"),
}

VERBS = ("read", "load", "set", "add", "next", "init", "scan", "pack", "put", "pick", "send", "sync")
NOUNS = ("item", "line", "name", "block", "entry", "field", "user", "chunk", "row", "part", "state", "unit")

TASKS: tuple[Task, ...] = (
    Task(  # duplicate a string
        parameters=("const char *$src",),
        variables=("char *$dst;",),
        statements={
            "a": "$dst = malloc(strlen($src) + 1);",
            "b": "$dst = malloc(strlen($src + 1));",
            "n": "if ($dst == NULL) @fail",
            "c": "strcpy($dst, $src);",
        },
        forms={0: ("bnc",), 3: ("acn",), 4: ("anc",)},
    ),
    Task(  # cut a string at a separator
        parameters=("char *$src",),
        variables=("char $dst[$N], *$hit;", "size_t $len;"),
        statements={
            "h": "$hit = strchr($src, $char);",
            "n": "if ($hit == NULL) @fail",
            "z": "*$hit = 0;",
            "l": "$len = $hit - $src;",
            "r": "$len = $src - $hit;",
            "k": "if ($len >= sizeof($dst)) @fail",
            "c": "memcpy($dst, $src, $len);",
            "t": "$dst[$len] = 0;",
        },
        forms={0: ("hnzltkc",), 1: ("hnzlckt",), 2: ("hnzrkct",), 3: ("hznlkct",), 4: ("hnzlkct",)},
    ),
    Task(  # read from a descriptor
        parameters=("int fd",),
        variables=("char $dst[$N];", "int $len;"),
        statements={
            "r": "$len = read(fd, $dst, sizeof($dst) - 1);",
            "f": "$len = read(fd, $dst, sizeof($dst));",
            "k": "if ($len < 0) @fail",
            "t": "$dst[$len] = 0;",
        },
        forms={0: ("fkt", "rtk"), 4: ("rkt",)},
    ),
    Task(  # read the first line of a file; 4: also after it was closed
        parameters=("const char *$src",),
        variables=("char $dst[$N];", "FILE *$file;"),
        statements={
            "o": '$file = fopen($src, "r");',
            "n": "if ($file == NULL) @fail",
            "g": "fgets($dst, sizeof($dst), $file);",
            "c": "fclose($file);",
        },
        forms={3: ("ognc",), 4: ("ongc", "oncg")},
    ),
    Task(  # copy a range of characters
        parameters=("const char *$begin", "const char *$end", "int $val"),
        variables=("char $dst[$N];", "size_t $len;"),
        statements={
            "n": "if ($begin == NULL) @fail",
            "v": "$val = *$begin;",
            "l": "$len = $end - $begin;",
            "r": "$len = $begin - $end;",
            "k": "if ($len >= sizeof($dst)) @fail",
            "c": "memcpy($dst, $begin, $len);",
            "t": "$dst[$len] = 0;",
        },
        forms={0: ("nvltkc",), 1: ("nvlckt",), 2: ("nvrkct",), 3: ("vnlkct",), 4: ("nvlkct",)},
    ),
    Task(  # set a cell of a structure
        parameters=("struct $struct *$ptr", "int $idx", "int $val"),
        variables=(),
        statements={
            "n": "if ($ptr == NULL) @fail",
            "k": "if ($idx < 0 || $idx >= $N) @fail",
            "w": "if ($idx < 0 && $idx >= $N) @fail",
            "u": "$ptr->$member[$idx] = $val;",
            "a": "if ($ptr != NULL && $idx < $N)\n    $ptr->$member[$idx] = $val;",
            "o": "if ($ptr != NULL || $idx < $N)\n    $ptr->$member[$idx] = $val;",
        },
        forms={0: ("nuk", "nwu"), 3: ("kun", "o"), 4: ("nku", "a")},
    ),
    Task(  # fill an array from a pointer
        parameters=("$type *$src", "$type $val"),
        variables=("$type $tab[$N];",),
        statements={
            "n": "if ($src == NULL) @fail",
            "v": "$val = *$src;",
            "r": "for (int $idx = 0; $idx < $N; $idx++)\n    $tab[$idx] = $val;",
            "w": "for (int $idx = 0; $idx <= $N; $idx++)\n    $tab[$idx] = $val;",
            "s": "for (int $idx = 1; $idx <= $N; $idx++)\n    $tab[$idx - 1] = $val;",
        },
        forms={0: ("nvw",), 3: ("vnr", "vns"), 4: ("nvr", "nvs")},
    ),
    Task(  # name a structure; 4: also after it was freed
        parameters=("struct $struct *$ptr", "const char *$src"),
        variables=(),
        statements={
            "n": "if ($ptr == NULL) @fail",
            "k": "if (strlen($src) >= sizeof($ptr->$member)) @fail",
            "c": "strcpy($ptr->$member, $src);",
            "f": "free($ptr);",
        },
        forms={1: ("nckf",), 3: ("kcnf",), 4: ("nkcf", "nkfc")},
    ),
    Task(  # copy with a limit
        parameters=("const char *$src",),
        variables=("char $dst[$N];", "size_t $len;"),
        statements={
            "s": "$len = strlen($src);",
            "z": "$len = sizeof($dst);",
            "g": "strncpy($dst, $src, sizeof($dst));",
            "b": "strncpy($dst, $src, strlen($src));",
            "t": "$dst[sizeof($dst) - 1] = 0;",
            "e": "$dst[sizeof($dst)] = 0;",
            "d": "$len = $len - 1;",
        },
        forms={0: ("sged",), 1: ("zbt",), 4: ("sgt",)},
    ),
    Task(  # measure up to a separator in one of two strings
        parameters=("char *${src}1", "char *${src}2"),
        variables=("char *$hit;", "size_t $len;"),
        statements={
            "h": "$hit = strrchr(${src}1, $char);",
            "n": "if ($hit == NULL) @fail",
            "z": "*$hit = 0;",
            "l": "$len = $hit - ${src}1;",
            "w": "$len = $hit - ${src}2;",
            "p": "puts(${src}2);",
            "q": "puts(${src}1);",
        },
        forms={2: ("hnzwq",), 3: ("hznlp",), 4: ("hnzlp",)},
    ),
    Task(  # copy a range of numbers
        parameters=("$type *$begin", "$type *$end"),
        variables=("$type $tab[$N];", "size_t $len;"),
        statements={
            "l": "$len = ($end - $begin) * sizeof($type);",
            "r": "$len = ($begin - $end) * sizeof($type);",
            "k": "if ($len > sizeof($tab)) @fail",
            "c": "memcpy($tab, $begin, $len);",
        },
        forms={1: ("lck",), 2: ("rkc",), 4: ("lkc",)},
    ),
    Task(  # look up a quotient; 4: also divided before the check for zero
        parameters=("int $val", "int $len"),
        variables=("int $tab[$N] = {0}, $idx, $sum;",),
        statements={
            "z": "if ($len <= 0) @fail",
            "d": "$idx = $val / $len;",
            "k": "if ($idx >= $N) @fail",
            "u": "$sum = $tab[$idx];",
        },
        forms={0: ("zduk",), 4: ("zdku", "dzku")},
    ),
    Task(  # add to a cell; 4: also with the check for overflow too late
        parameters=("int $idx", "int $val", "int $sum"),
        variables=("int $tab[$N];",),
        statements={
            "o": "if ($val > INT_MAX - $sum) @fail",
            "s": "$sum = $sum + $val;",
            "k": "if ($idx >= $N) @fail",
            "u": "$tab[$idx] = $sum;",
        },
        forms={0: ("osuk",), 4: ("osku", "soku")},
    ),
    Task(  # measure with a moving pointer
        parameters=("const char *$src",),
        variables=("const char *$hit = $src;", "size_t $len;"),
        statements={
            "n": "if ($src == NULL) @fail",
            "w": "while (*$hit != $char)\n    $hit++;",
            "l": "$len = $hit - $src;",
        },
        forms={2: ("nlw",), 3: ("wnl",), 4: ("nwl",)},
    ),
    Task(  # print into a buffer
        parameters=("const char *$src",),
        variables=("char $dst[$N];", "size_t $len;"),
        statements={
            "g": 'snprintf($dst, sizeof($dst), "%s", $src);',
            "b": 'snprintf($dst, strlen($src), "%s", $src);',
            "s": "$len = strlen($src);",
            "z": "$len = sizeof($dst);",
        },
        forms={1: ("bz",), 4: ("gs",)},
    ),
    Task(  # make a structure; 4: also used after it was freed
        parameters=("int $val",),
        variables=("struct $struct *$ptr;",),
        statements={
            "m": "$ptr = malloc(sizeof(*$ptr));",
            "n": "if ($ptr == NULL) @fail",
            "i": "if ($ptr != NULL) @fail",
            "u": "$ptr->$member = $val;",
            "f": "free($ptr);",
        },
        forms={3: ("munf", "miuf"), 4: ("mnuf", "mnfu")},
    ),
    Task(  # measure and move on
        parameters=("const char *$begin", "const char *$end"),
        variables=("size_t $len;",),
        statements={
            "l": "$len = $end - $begin;",
            "r": "$len = $begin - $end;",
            "m": "$begin = $end;",
        },
        forms={2: ("ml", "rm"), 4: ("lm",)},
    ),
)

FILLERS: tuple[str, ...] = (
    "$x = $y - 1;",
    "$x = $y + 1;",
    "$x = ($y << $small) | $x;",
    "if ($x > 0 && $y < $N)\n    $x += $y;",
    "if ($x == $small || $y != $N)\n    $y = $x;",
    "for ($x = 1; $x <= $small; $x++)\n    $y += $x;",
    "for ($x = 0; $x < $small; $x++)\n    $y -= $x;",
    "while ($y > $small)\n    $y--;",
    "$y = $x / $small;",
    "$x = $y * $small;",
    "if ($x >= $N)\n    $x = 0;",
    'puts("done");',
    'printf("%d", $x);',
    "$x = $y % $small;",
    "if ($x != 0)\n    $y = $N / $x;",
)
