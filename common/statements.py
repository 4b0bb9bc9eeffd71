"""The sentences about privacy that every result carries, in one place."""

import math

UNIT = "one customer of one merchant: all of that customer's rows at that merchant"
RELATION = "add or remove one customer's row"

_NOT_MASKED = (
    "The sums of this run were not masked: whoever runs the coordinator sees each merchant's "
    "single noisy message. "
)
NOT_MASKED = {  # by training mode
    "distributed": _NOT_MASKED + "The epsilon of the published results holds towards everybody "
    "who sees sums only (a merchant of the run also knows its own noise share: see "
    "aggregation.colluders); towards the coordinator the larger 'epsilon towards the server' "
    "holds.",
    "local": _NOT_MASKED + "Each message holds noise enough by itself, so that the same epsilon "
    "holds towards the coordinator.",
}
_MASKED = (
    "The sums of this run were masked: the coordinator saw sums over at least {merchants} "
    "merchants, and no single message. This holds towards a coordinator that colludes with fewer "
    "than a third of the merchants of a sum. "
)
MASKED = {  # by training mode; `merchants` is to be filled in
    "distributed": _MASKED + "The same epsilon holds towards the coordinator by itself. "
    "Whoever colludes with it, or with others, knows its own noise share: the table of colluders "
    "tells what is left.",
    "local": _MASKED + "Each message holds noise enough by itself, so that the same epsilon "
    "holds towards the coordinator, whoever colludes with it.",
}
NOT_MASKED_COMPARED = (
    "The sums of the federated runs were not masked: the epsilon of 'Together, shared noise' holds "
    "towards those who see sums only, not towards whoever runs the coordinator."
)
NOT_MASKED_SWEPT = {  # by training mode
    mode: told.replace("of this run", "of these runs") for mode, told in NOT_MASKED.items()
}
MASKED_COMPARED = "The sums of the federated runs were masked, as in a real federation."
NOT_FOR_RELEASE = (
    "This run was seeded: it can be repeated, and its noise can be guessed by whoever knows the "
    "seed. Its results are not for release."
)
SWEPT_SYNTHETIC = (
    "Nobody stands behind a row, so choosing a configuration by this table spends nobody's "
    "privacy. On real customers it would: every run of a sweep reads them, and no single run's "
    "epsilon counts the others."
)
SWEPT_SEEDED = (
    "The runs were seeded: they can be repeated, and their noise can be guessed by whoever knows "
    "the seed. Their results are not for release."
)
NOT_PROTECTED = (
    "that a merchant takes part, when, how long it takes to answer (which grows with the number "
    "of its customers), and the reasons that it gives for a refusal",
    "the contract and the size of messages",
    "each merchant's assignments of its own customers, which stay with that merchant",
    "a person who is a customer of several merchants, or several customers of one, is protected "
    "as each of them; for the person the parts compose",
)
ASSUMPTIONS = (
    "every admitted sum holds the noise shares of at least the stated number of honest merchants "
    "(mode 'distributed')",
    "the noise is keyed by the operating system and the keys stay secret",
    "training and held-out customers are told apart by a hash of the person alone; all releases "
    "are composed as if every customer were in each of them",
)
MASKED_ASSUMPTIONS = (
    "the public keys that members enrolled belong to different merchants, and fewer than a third "
    "of the merchants of a sum collude with the coordinator",
)


def sums_statement(mode: str, *, secure: bool, merchants: int) -> str:
    """Say what the coordinator saw in a run.

    Args:
        mode: The training's mode.
        secure: Whether sums were masked.
        merchants: In the smallest sum.
    """
    return MASKED[mode].format(merchants=f"{merchants:,}") if secure else NOT_MASKED[mode]


def swept(runs: int, epsilon: float | None, delta: float, *, seeded: bool) -> str:
    """Say what choosing by the figures of many runs over the same real customers costs.

    Args:
        runs: That came to an end, failed ones included.
        epsilon: Of all of them together; None where no bound can be given.
        delta: Of that epsilon.
        seeded: Whether the noise of some can be guessed, so that no bound holds.
    """
    start = (
        "Every epsilon here counts its own run alone, but all runs read the same customers. "
        "Whoever chooses a configuration by these figures, or shows them, releases something of "
        f"all of the {runs:,} runs in this folder. "
    )
    cost = (
        f"Together they cost an epsilon of at most {epsilon_text(epsilon)} at delta {delta:.3g} "
        "towards those who see what the runs publish, if the grid was fixed before any of it. "
        if epsilon is not None
        else "No finite epsilon can be given for them together. "
    )
    if seeded:
        cost = "Noise of theirs comes from a seed and can be guessed, so no epsilon holds. "
    return (
        f"{start}{cost}Training with the chosen configuration costs its own epsilon on top, and no "
        "merchant's ledger knows of this sweep. To choose for free, sweep over synthetic customers."
    )


def epsilon_text(value: float, digits: int = 4) -> str:
    """Write an epsilon, rounded up in its last digit.

    >>> epsilon_text(0.97121), epsilon_text(1.0000000000000002), epsilon_text(float("inf"))
    ('0.9713', '1', 'unbounded')
    """
    if not math.isfinite(value):
        return "unbounded"
    if value <= 0:
        return "0"
    step = 10.0 ** (digits - 1 - math.floor(math.log10(value)))
    return f"{math.ceil(round(value * step, 6)) / step:.12g}"


def odds_statement(epsilon: float, delta: float) -> str:
    """Say what an epsilon at a delta in (0, 1) means for somebody curious about one customer.

    By Bayes' rule a likelihood ratio of at most e^epsilon turns even odds into at most
    e^epsilon / (1 + e^epsilon); the percentage is rounded up.

    >>> odds_statement(1.0, 1e-05).split(": ")[0]
    'Somebody who holds it as likely as not that a certain customer is in the data'
    >>> "at most 73.2 % sure" in odds_statement(1.0, 1e-05)
    True
    """
    start = (
        "Somebody who holds it as likely as not that a certain customer is in the data: after "
        "seeing everything that was released, and whatever else they know, they are "
    )
    sure = 1.0 / (1.0 + math.exp(-epsilon)) if epsilon > -700 else 0.0
    if not math.isfinite(epsilon) or sure > 0.999:
        return start + "no longer held back by any limit worth the name."
    chance = f"1 in {math.floor(1 / delta + 1e-6):,}" if delta > 1e-12 else "next to nothing"
    return (
        start + f"at most {math.ceil(round(1000 * sure, 6)) / 10:g} % sure (50 % would be no "
        f"knowledge at all), apart from a chance of about {chance}."
    )


AUDIT_LIMITS = (
    "whether the rows that a merchant trained on were its real customers, complete, and each of "
    "them in one row",
    "the keys of the noise: evidence holds no noise, only what was charged for it and the hash of "
    "the code that says to have drawn it; `hansa audit empirical` tests that code",
    "what a merchant published in other ways than through Hansa, which is in no ledger of it",
    "a story that the coordinator and all merchants of a run agreed to write down together",
    "who is behind a key: that every enrolled merchant is a business of its own",
)
