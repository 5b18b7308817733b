"""How long `op.fit_head` takes: a usual set of cached features, and a large one.

Where neither open_clip nor transformers is loaded yet (a classifier without a text encoder), the first fit takes about
a second more, in which torch.optim loads torch's compiler.
"""

from __future__ import annotations

import argparse
import resource
import time

import open_clip  # noqa: F401  # as whoever has a text encoder has it loaded
import torch
from torch.nn import functional as F

from ordinal_prompt.fitting import fit_map


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--large", action="store_true", help="100,000 samples and 101 ranks as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| samples | features | ranks | seconds | memory, MiB |\n|---|---|---|---|---|")
    for samples, ranks in ((1_000, 5), *([(100_000, 101)] if options.large else [])):
        torch.manual_seed(0)
        prototypes = F.normalize(torch.randn(ranks, 512), dim=1)
        labels = torch.randint(ranks, (samples,))
        features = F.normalize(prototypes[labels] + 2 * torch.randn(samples, 512) / 512**0.5, dim=1)
        start = time.perf_counter()
        fit_map(features, labels, prototypes)
        seconds = time.perf_counter() - start
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"| {samples:,} | 512 | {ranks} | {seconds:.2f} | {memory:.0f} |")


if __name__ == "__main__":
    main()
