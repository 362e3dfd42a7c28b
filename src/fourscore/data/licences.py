"""What a data licence obliges, one plain sentence each. A reminder, not legal advice."""

from __future__ import annotations

import difflib
import re

from fourscore.files import FourscoreError

NOT_LEGAL_ADVICE = "This is a reminder, not legal advice."

_NAME = "Name the source and its licence wherever you pass on the data or a model made from it."
_ALIKE = "What you make from the data and pass on must stand under the same licence (share alike)."
_NON_COMMERCIAL = "No commercial use: neither the data nor a product made from it may serve business."
_NO_DERIVATIVES = "You may not pass on changed versions of the data; whether a tuned model is one is disputed: ask before you publish it."
_NOTICE = "Keep the copyright notice and the licence text with every copy of the data."
_STATE_CHANGES = "Say what you changed, and keep the NOTICE file where there is one."
_SOURCE = "Whoever gets a work based on the data must get it under the same licence, with its source."
_NOTHING = "No conditions: the data is in the public domain or as good as."

# The first pattern that matches the whole SPDX key holds.
_OBLIGATIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"CC0-1\.0|PDDL-1\.0|Unlicense|0BSD|MIT-0|CC-PDDC", (_NOTHING,)),
    (r"MIT|BSD-.*|ISC|Zlib|BSL-1\.0|PostgreSQL", (_NOTICE,)),
    (r"Apache-2\.0", (_NOTICE, _STATE_CHANGES)),
    (r"CC-BY-NC-SA-.*", (_NAME, _NON_COMMERCIAL, _ALIKE)),
    (r"CC-BY-NC-ND-.*", (_NAME, _NON_COMMERCIAL, _NO_DERIVATIVES)),
    (r"CC-BY-NC-.*", (_NAME, _NON_COMMERCIAL)),
    (r"CC-BY-SA-.*", (_NAME, _ALIKE)),
    (r"CC-BY-ND-.*", (_NAME, _NO_DERIVATIVES)),
    (r"CC-BY-\d.*", (_NAME,)),
    (r"ODC-By-1\.0", (_NAME,)),
    (r"ODbL-1\.0", (_NAME, "A changed database that you pass on or use in public must stand under the ODbL too (share alike).")),
    (r"CDLA-Permissive-.*", (_NOTICE,)),
    (r"CDLA-Sharing-1\.0", (_NOTICE, _ALIKE)),
    (r"(LGPL|GPL|AGPL|MPL|EPL|EUPL|GFDL)-.*", (_NOTICE, _SOURCE)),
)
_OWN = "Your own data: you set the terms; make sure that you hold the rights, personal data of others included."


def obligations(licence: str | None) -> list[str]:
    """What using data under this SPDX expression obliges, one sentence each; empty for None (unknown).

    An expression with OR or AND, and `LicenseRef-` names, are understood. FourscoreError for what is not SPDX, with
    the nearest names.
    """
    if licence is None:
        return []
    tree = _parse(licence)
    return [*dict.fromkeys(_sentences(tree)), NOT_LEGAL_ADVICE]


def _parse(licence: str) -> object:
    from license_expression import ExpressionError, LicenseSymbol, Licensing, get_spdx_licensing

    known = get_spdx_licensing()
    # SPDX lets anyone make LicenseRef- names; the index has its own, which are kept
    own = sorted({name for name in re.findall(r"LicenseRef-[A-Za-z0-9.-]+", licence) if name not in known.known_symbols})
    licensing = Licensing([*known.known_symbols.values(), *(LicenseSymbol(name) for name in own)]) if own else known
    try:
        tree = licensing.parse(licence, validate=True, strict=True)
    except ExpressionError as error:
        raise _not_spdx(licence, list(known.known_symbols), str(error)) from None
    if tree is None:
        raise _not_spdx(licence, list(known.known_symbols), "empty")
    return tree


def _not_spdx(licence: str, known: list[str], reason: str) -> FourscoreError:
    public = [name for name in known if not name.startswith("LicenseRef-")]
    folded = {re.sub(r"[\s_]+", "-", name).lower(): name for name in public}
    wanted = re.sub(r"[\s_]+", "-", licence.strip()).lower()
    near = [folded[name] for name in difflib.get_close_matches(wanted, list(folded), n=3, cutoff=0.6)]
    near = near or [name for key, name in folded.items() if key.startswith(wanted)][:3]
    hint = f"did you mean {', '.join(near)}?" if near else "`LicenseRef-own` for your own data"
    return FourscoreError(f"`{licence}` is not an SPDX licence expression", where="data.licence", todo=hint)


def _sentences(tree: object) -> list[str]:
    from license_expression import AND, OR, LicenseWithExceptionSymbol

    if isinstance(tree, OR):
        sides = [" ".join(dict.fromkeys(_sentences(side))) for side in tree.args]
        return ["You may choose: " + " Or: ".join(f"{side.render()}: {text}" for side, text in zip(tree.args, sides))]
    if isinstance(tree, AND):
        return [sentence for side in tree.args for sentence in _sentences(side)]
    key = str(tree.license_symbol.key if isinstance(tree, LicenseWithExceptionSymbol) else tree.key)  # type: ignore[attr-defined]
    if key == "LicenseRef-own":
        return [_OWN]
    for pattern, sentences in _OBLIGATIONS:
        if re.fullmatch(pattern, key):
            return list(sentences)
    return [f"Read the text of {key}: its obligations are not in our table."]
