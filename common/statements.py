"""The sentences about privacy that every result carries, in one place."""

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
NOT_FOR_RELEASE = (
    "This run was seeded: it can be repeated, and its noise can be guessed by whoever knows the "
    "seed. Its results are not for release."
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
