"""Whether a text is made for a reader, and not for the code that makes it: a message of an error, a warning, a log.

A size in a message is no decision: ``assert h == w, f"{h} is not {w}"`` must not tie a graph to one size. A size in any
other text is, as in ``self.blocks[f"block_{n}"]``: what becomes of the text is not seen.
"""

import dis
import functools
import re
from types import CodeType, FrameType

from fxcompress.trace.code.frames import is_users

_TELLS = re.compile(r"^_*(assert|warn|print|debug|info$|log$|logger|logging|check)|(Error|Exception|Warning)$")
_ENDS = ("POP_TOP", "STORE_", "RETURN_", "POP_JUMP", "JUMP", "RESUME")


def is_message(frame: FrameType | None) -> bool:
    """Whether the code of a frame makes a text that it hands to something with the name of an assertion, or the like.

    Code that is not the user's makes messages alone.
    """
    return frame is None or not is_users(frame) or _tells(frame.f_code, frame.f_lasti)


@functools.cache
def _tells(code: CodeType, offset: int) -> bool:
    """Whether the statement that is at ``offset`` has named such a thing before it got there."""
    before = [step for step in dis.get_instructions(code) if step.offset < offset]
    for step in reversed(before):
        if step.opname.startswith(_ENDS):
            return False
        if step.opname.startswith("LOAD") and _TELLS.search(str(step.argval)) and step.opname != "LOAD_CONST":
            return True
    return False
