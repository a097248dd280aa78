"""How close images are to their originals, image by image."""

import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure


def ssim_window(height: int, width: int) -> tuple[int, bool]:
    """
    The window over which [`reconstruction_metrics`] compares images of a size.

    Args:
        height, width (`int`): Size of the images in pixels.

    Returns:
        `tuple[int, bool]`: The side of the window in pixels, and whether it is Gaussian: 11 and Gaussian with sigma
        1.5, as in Wang et al. (2004); the largest odd side that fits, and uniform, for images of less than 11 pixels.

    Raises:
        ValueError: For images of less than 3 pixels.

    Example:

    ```py
    >>> from diffusers_ext.evaluation.reconstruction import ssim_window

    >>> ssim_window(128, 128), ssim_window(8, 8)
    ((11, True), (7, False))

    ```
    """
    side = min(height, width)
    if side < 3:
        raise ValueError(f"images of {height} x {width} are too small for SSIM: both sides need at least 3 pixels.")
    return (11, True) if side >= 11 else (side - 1 + side % 2, False)


def reconstruction_metrics(images: torch.Tensor, reconstructions: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    MSE, PSNR and SSIM of reconstructions, one number per image.

    - `mse`: mean squared error over pixels and channels.
    - `psnr`: `10 log10(1 / mse)` in dB, infinite for equal images. Of several images the mean of the images' PSNR is
      reported, not the PSNR of their mean MSE, which is lower.
    - `ssim`: structural similarity (Wang et al., 2004, `K1 = 0.01`, `K2 = 0.03`), each channel on its own, windows
      around every pixel over mirrored borders, mean over pixels and channels; see [`ssim_window`].

    All is computed in float64.

    Args:
        images (`torch.Tensor`): Originals with values in [0, 1], shape `(batch, channels, height, width)`.
        reconstructions (`torch.Tensor`): What to compare with them, of the same shape, values in [0, 1].

    Returns:
        `dict[str, torch.Tensor]`: `mse`, `psnr` and `ssim`, float64 on the CPU, shape `(batch,)`.

    Raises:
        TypeError: For tensors that are not of floats.
        ValueError: For shapes that differ or have not 4 dimensions, images of less than 3 pixels, and values that are
            not in [0, 1] (NaN included).

    Example:

    ```py
    >>> import torch
    >>> from diffusers_ext.evaluation.reconstruction import reconstruction_metrics

    >>> metrics = reconstruction_metrics(torch.zeros(2, 3, 16, 16), torch.full((2, 3, 16, 16), 0.1))
    >>> metrics["mse"], metrics["psnr"]
    (tensor([0.0100, 0.0100], dtype=torch.float64), tensor([20.0000, 20.0000], dtype=torch.float64))

    ```
    """
    if images.shape != reconstructions.shape or images.ndim != 4:
        raise ValueError(
            f"`images` has shape {tuple(images.shape)}, but `reconstructions` has {tuple(reconstructions.shape)}: "
            "both must have the same (batch, channels, height, width)."
        )
    for name, value in (("images", images), ("reconstructions", reconstructions)):
        if not value.is_floating_point():
            raise TypeError(f"`{name}` has dtype {value.dtype}, but must hold floats in [0, 1]: divide by 255.")
        low, high = value.min().item(), value.max().item()
        if not (low >= 0 and high <= 1):
            raise ValueError(f"`{name}` has values in [{low:.4g}, {high:.4g}], but they must be in [0, 1].")
    side, gaussian = ssim_window(*images.shape[-2:])

    device = "cpu" if images.device.type == "mps" else images.device  # MPS has no float64
    images, reconstructions = (x.to(device, torch.float64) for x in (images, reconstructions))
    # The map of all pixels: which of them the mean is over has changed between versions of torchmetrics.
    _, ssim = structural_similarity_index_measure(
        reconstructions,
        images,
        gaussian_kernel=gaussian,
        sigma=1.5,
        kernel_size=side,
        reduction="none",
        data_range=1.0,
        return_full_image=True,
    )
    psnr = peak_signal_noise_ratio(reconstructions, images, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return {
        "mse": (images - reconstructions).square().mean((1, 2, 3)).cpu(),
        "psnr": psnr.cpu(),
        "ssim": ssim.mean((1, 2, 3)).cpu(),
    }
