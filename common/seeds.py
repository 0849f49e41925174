"""Seeds: every random choice has one of its own, derived from the run's seed and the choice's place."""

import hashlib


def derive_seed(seed: int, *place: int | str) -> int:
    """A seed in [0, 2**63) for the choice at `place`, for example `(step, prompt, sample)`.

    Different places give independent seeds, the same place always the same one, on every machine and Python
    version. Source: ours.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in (seed, *place))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def attempt_seed(response_seed: int, segment: int, attempt: int) -> int:
    """The seed of one attempt at one segment of a response.

    The first attempt at the first segment uses the response's seed itself, so that a response of which nothing is
    erased is the one that plain vLLM samples with `seed=response_seed`.
    """
    if segment == 0 and attempt == 0:
        return response_seed
    return derive_seed(response_seed, segment, attempt)
