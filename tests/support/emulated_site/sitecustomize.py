"""Python finds this module by itself: stages of the GPU benchmark then have an emulated GPU."""

import sys

if "benchmarks.gpu.stage" in sys.orig_argv:
    from tests.support.emulated_stage import prepare

    prepare(sys.orig_argv[sys.orig_argv.index("benchmarks.gpu.stage") + 1])
