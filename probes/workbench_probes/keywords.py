"""The reserved words of the programming languages that a corpus may hold, for the token class "keyword".

Sources: Python's own list (`keyword.kwlist`); C: ISO/IEC 9899:2011, 6.4.1; Go: the language specification, "Keywords";
JavaScript: ECMA-262, 12.7.2, with `let`, `static` and `async`; Rust: the reference, "Keywords", strict.
"""

import keyword

_RESERVED = {
    "c": "auto break case char const continue default do double else enum extern float for goto if inline int long "
    "register restrict return short signed sizeof static struct switch typedef union unsigned void volatile while",
    "go": "break case chan const continue default defer else fallthrough for func go goto if import interface map "
    "package range return select struct switch type var",
    "js": "async await break case catch class const continue debugger default delete do else export extends false "
    "finally for function if import in instanceof let new null return static super switch this throw true try typeof "
    "var void while with yield",
    "rust": "as async await break const continue crate dyn else enum extern false fn for if impl in let loop match mod "
    "move mut pub ref return Self self static struct super trait true type unsafe use where while",
}
KEYWORDS: dict[str, frozenset[str]] = {
    "python": frozenset(keyword.kwlist),
    **{language: frozenset(words.split()) for language, words in _RESERVED.items()},
}
"""Language -> its reserved words; the domain `code-go` holds texts in the language `go`."""


def is_keyword(text: str, domain: str | None) -> bool:
    """Whether a token is a reserved word of the language that its text is written in.

    >>> is_keyword(" for", "code-c"), is_keyword(" for", "fiction"), is_keyword("fork", "code-c")
    (True, False, False)
    """
    language = (domain or "").removeprefix("code-") if (domain or "").startswith("code-") else ""
    return text.strip() in KEYWORDS.get(language, frozenset())
