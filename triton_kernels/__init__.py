"""Triton kernels of gptvq; installed as gptvq.triton_kernels."""
if __name__ != "gptvq.triton_kernels":
    raise ImportError(
        f"this folder holds gptvq's Triton kernels and was imported as {__name__!r}; import gptvq.triton_kernels instead, and keep "
        "gptvq's source folder off sys.path if you want the other package that is named triton_kernels"
    )
