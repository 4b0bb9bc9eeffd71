"""The sentences about privacy that every result carries, in one place."""

UNIT = "one customer of one merchant: all of that customer's rows at that merchant"
RELATION = "add or remove one customer's row"

_NOT_MASKED = (
    "The sums of this run were not masked: whoever runs the coordinator sees each merchant's "
    "single noisy message. "
)
NOT_MASKED = {  # by training mode
    "distributed": _NOT_MASKED + "The epsilon of the published results holds towards everybody "
    "who sees sums only; towards the coordinator the larger 'epsilon towards the server' holds.",
    "local": _NOT_MASKED + "Each message holds noise enough by itself, so that the same epsilon "
    "holds towards the coordinator.",
}
NOT_FOR_RELEASE = (
    "This run was seeded: it can be repeated, and its noise can be guessed by whoever knows the "
    "seed. Its results are not for release."
)
NOT_PROTECTED = (
    "that a merchant takes part, and when",
    "the contract and the size of messages",
    "each merchant's assignments of its own customers, which stay with that merchant",
    "a person who is a customer of several merchants is protected at each of them; for the "
    "person the parts compose",
)
PERSON_TABLE = (
    # merchants a person shops at, epsilon with one shared sum, epsilon with independent noise
    (2.5, 2.9, 1.7),
    (5, 6.6, 2.5),
    (12, 20.4, 4.2),
)
ASSUMPTIONS = (
    "every admitted sum holds the noise shares of at least the stated number of honest merchants "
    "(mode 'distributed')",
    "the noise is keyed by the operating system and the keys stay secret",
    "training and held-out customers are told apart by a hash of the person alone; all releases "
    "are composed as if every customer were in each of them",
)
