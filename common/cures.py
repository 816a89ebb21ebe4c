"""What to do about errors whose own text does not say it: those of devices, drivers and collectives."""

CURES = (
    ("Cannot re-initialize NPU in forked", "data sets and transforms run in other processes: keep them on the CPU"),
    ("Cannot re-initialize CUDA in forked", "data sets and transforms run in other processes: keep them on the CPU"),
    (
        "error code is 507033",
        "the card cannot be opened: is it healthy (npu-smi info), is its /dev/davinci* in the container?",
    ),
    ("error code is 507899", "the driver of the card reports a failure: npu-smi info shows its health"),
    ("EI0006", "the cards cannot reach each other: firewall, HCCL_SOCKET_IFNAME, the same CANN everywhere"),
    ("EI0002", "a rank waited for the others: look for the rank that stopped first, then for HCCL_EXEC_TIMEOUT"),
    ("error code is 500001", "torch_npu and CANN do not fit each other: see the table of versions in README.md"),
    ("Cannot find bin of op", "CANN's kernels (ops) package of this chip is missing"),
)


def cure(text):
    """Return what helps against an error whose message is `text`, or an empty string."""
    return next((advice for known, advice in CURES if known in text), "")
