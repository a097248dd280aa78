"""How well predicted image embeddings stand in for true ones: distances, cosines, and the baselines to beat.

No number decides alone. A linear regression has a higher cosine to the true embedding than samples of the true
conditional distribution have, because it predicts the mean of all images that fit a caption; its embeddings are no
image's, which the Fréchet distance and the diversity show.
"""

from collections.abc import Callable

import torch
from torch.nn.functional import cosine_similarity, normalize


def frechet_distance(embeds: torch.Tensor, other_embeds: torch.Tensor) -> float:
    r"""
    Squared Fréchet distance between the Gaussians that have the means and covariances of two sets of embeddings.

    `|m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2)` (https://huggingface.co/papers/1706.08500, eq. 6), in
    float64. It has a bias that falls with the number of embeddings: compare sets of equal size only, each of many more
    embeddings than dimensions, and compare with the distance between two sets of true embeddings.

    Args:
        embeds (`torch.Tensor`): Shape `(num_embeds, dim)`, two embeddings at least.
        other_embeds (`torch.Tensor`): Shape `(num_other_embeds, dim)`.

    Returns:
        `float`: The distance, 0 or more, in the squared unit of the embeddings. Of unit vectors it is 4 at most.

    Raises:
        ValueError: The shapes do not fit, a set has fewer than two embeddings, or a value is not finite.

    Example:

    ```py
    >>> import torch
    >>> from diffusers_ext.evaluation.embeddings import frechet_distance

    >>> embeds = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    >>> round(frechet_distance(embeds, embeds + torch.tensor([3.0, 4.0])), 6)
    25.0

    ```
    """
    _check(embeds=embeds, other_embeds=other_embeds)
    for name, value in {"embeds": embeds, "other_embeds": other_embeds}.items():
        if len(value) < 2:
            raise ValueError(f"`{name}` has {len(value)} embeddings, but a covariance needs at least 2.")
    embeds, other_embeds = (x.detach().to("cpu", torch.float64) for x in (embeds, other_embeds))
    gap = (embeds.mean(0) - other_embeds.mean(0)).square().sum()
    covariance, other_covariance = (torch.cov(x.T).reshape(x.shape[1], x.shape[1]) for x in (embeds, other_embeds))
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ other_covariance @ root).clamp(min=0).sqrt().sum()
    return max((gap + covariance.trace() + other_covariance.trace() - 2 * cross).item(), 0.0)


def linear_regression(inputs: torch.Tensor, targets: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """
    The affine map with the least squared error, `x -> (x - E x) W + E y`, in float64.

    Args:
        inputs (`torch.Tensor`): Shape `(num_samples, input_dim)`.
        targets (`torch.Tensor`): Shape `(num_samples, target_dim)`.

    Returns:
        `Callable`: Maps inputs of shape `(n, input_dim)` to float64 predictions of shape `(n, target_dim)`.

    Raises:
        ValueError: The shapes do not fit, or a value is not finite.

    Example:

    ```py
    >>> import torch
    >>> from diffusers_ext.evaluation.embeddings import linear_regression

    >>> predict = linear_regression(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[5.0], [7.0], [9.0]]))
    >>> round(predict(torch.tensor([[3.0]])).item(), 6)
    11.0

    ```
    """
    _check(inputs=inputs)
    _check(targets=targets)
    if len(inputs) != len(targets):
        raise ValueError(f"`inputs` has {len(inputs)} rows, but `targets` has {len(targets)}: they must be pairs.")
    inputs, targets = (x.detach().to("cpu", torch.float64) for x in (inputs, targets))
    mean, target_mean = inputs.mean(0), targets.mean(0)
    centered = inputs - mean
    # normal equations: of size dim, however many samples; directions without variance get weight 0
    weight = torch.linalg.pinv(centered.T @ centered, hermitian=True, rtol=1e-12) @ (
        centered.T @ (targets - target_mean)
    )
    return lambda x: (x.detach().to("cpu", torch.float64) - mean) @ weight + target_mean


def zero_shot_accuracy(image_embeds: torch.Tensor, class_embeds: torch.Tensor, labels: torch.Tensor) -> float:
    """
    Share of image embeddings whose nearest class prompt, by cosine, is that of their class.

    Args:
        image_embeds (`torch.Tensor`): Shape `(num_images, dim)`, true or predicted.
        class_embeds (`torch.Tensor`): Text embedding of a prompt for each class, shape `(num_classes, dim)`.
        labels (`torch.Tensor`): Classes, integers in [0, num_classes) of shape `(num_images,)`.

    Returns:
        `float`: The accuracy, in [0, 1].

    Raises:
        ValueError: The shapes do not fit, a value is not finite, or a label has no prompt.

    Example:

    ```py
    >>> import torch
    >>> from diffusers_ext.evaluation.embeddings import zero_shot_accuracy

    >>> zero_shot_accuracy(torch.tensor([[3.0, 1.0], [0.0, 1.0]]), torch.eye(2), torch.tensor([0, 0]))
    0.5

    ```
    """
    _check(image_embeds=image_embeds, class_embeds=class_embeds)
    if labels.shape != image_embeds.shape[:1]:
        raise ValueError(
            f"`labels` has shape {tuple(labels.shape)}, but `image_embeds` has {tuple(image_embeds.shape)}: give one "
            "label for each embedding."
        )
    if labels.min() < 0 or labels.max() >= len(class_embeds):
        raise ValueError(
            f"`labels` are {int(labels.min())} to {int(labels.max())}, but `class_embeds` has {len(class_embeds)} "
            "rows: give a prompt for each class."
        )
    image_embeds, class_embeds = (
        normalize(x.detach().to("cpu", torch.float64), dim=1) for x in (image_embeds, class_embeds)
    )
    return ((image_embeds @ class_embeds.T).argmax(1) == labels.cpu()).double().mean().item()


def embedding_metrics(
    candidates: torch.Tensor,
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    train_image_embeds: torch.Tensor,
    train_text_embeds: torch.Tensor,
    *,
    captions: torch.Tensor | None = None,
    class_embeds: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
) -> dict[str, float]:
    r"""
    Predicted image embeddings against true ones and against the baselines that a prior has to beat.

    Cosines and Fréchet distances are of embeddings scaled to length 1, in float64. The baselines are the text
    embedding itself (`_text`), the text embedding moved by the mean difference between images and texts (`_text_gap`),
    the linear regression from text to image (`_linear`), the latter two fitted on the training pairs; and `_true`, the
    true embeddings: for cosines and accuracy what samples of the true distribution would reach about, for the Fréchet
    distance that between as many training images and the held-out ones. A perfect prior stays below that, since its
    draws are for the very captions of the held-out images.

    Args:
        candidates (`torch.Tensor`):
            Independent draws for each caption, shape `(num_pairs, num_candidates, dim)`, one at least.
        image_embeds (`torch.Tensor`): True image embeddings, held out, shape `(num_pairs, dim)`.
        text_embeds (`torch.Tensor`): Embeddings of the captions, shape `(num_pairs, dim)`.
        train_image_embeds, train_text_embeds (`torch.Tensor`): Training pairs, shape `(num_train_pairs, dim)`.
        captions (`torch.Tensor`, *optional*):
            Equal rows for equal captions, such as token ids, shape `(num_pairs, length)`: says which images share a
            caption, for the true diversity.
        class_embeds (`torch.Tensor`, *optional*): Text embedding of a prompt for each class, `(num_classes, dim)`.
        labels (`torch.Tensor`, *optional*):
            Class of each image, `(num_pairs,)`; -1 where the caption leaves it open and it is not counted.

    Returns:
        `dict[str, float]`: All of the first candidate where nothing else is said.

        - `cos_true`, `cos_text`: mean cosine to the true image and to the text embedding, and of the baselines;
          `cos_text_true` is the value to hit, neither more nor less;
        - `cos_shuffled`: to another pair's image; the difference from `cos_true` is what the caption tells;
        - `frechet`: of the predictions and the baselines;
        - `norm_ratio`: mean length of the predictions over that of the true embeddings;
        - `zero_shot_accuracy`: of the predictions and the baselines, with classes;
        - with several candidates: `best_of_k_cos_true_gain`, `best_of_k_cos_text_gain`, `best_of_k_frechet`: of the
          candidate that is nearest to the text, the first two less the mean over all candidates; `diversity`, 1 less
          the mean cosine between two candidates for a caption, 0 if they are all the same, and `diversity_true`, the
          same for images that share a caption, if there are any (then both are means over these captions).

    Raises:
        ValueError: The shapes do not fit, there are fewer than two pairs, or a value is not finite.

    Example:

    ```py
    >>> import torch
    >>> from diffusers_ext.evaluation.embeddings import embedding_metrics

    >>> text, image = torch.randn(2, 200, 4, generator=torch.Generator().manual_seed(0))
    >>> metrics = embedding_metrics(image[100:, None], image[100:], text[100:], image[:100], text[:100])
    >>> round(metrics["cos_true"], 6), metrics["frechet"] < metrics["frechet_true"] < metrics["frechet_linear"]
    (1.0, True)

    ```
    """
    if candidates.ndim != 3 or 0 in candidates.shape:
        raise ValueError(
            f"`candidates` has shape {tuple(candidates.shape)}, but must be (num_pairs, num_candidates, dim)."
        )
    _check(**{"candidates[:, 0]": candidates[:, 0]}, image_embeds=image_embeds, text_embeds=text_embeds)
    _check(train_image_embeds=train_image_embeds, train_text_embeds=train_text_embeds, image_embeds=image_embeds)
    if not candidates.isfinite().all():
        raise ValueError("`candidates` holds values that are not finite.")
    if not len(candidates) == len(image_embeds) == len(text_embeds) >= 2:
        raise ValueError(
            f"`candidates`, `image_embeds` and `text_embeds` have {len(candidates)}, {len(image_embeds)} and "
            f"{len(text_embeds)} rows, but must be of the same pairs, two at least."
        )
    if (class_embeds is None) != (labels is None):
        raise ValueError("of `class_embeds` and `labels` one is missing: give both for the accuracy, or none.")
    for name, value in {"captions": captions, "labels": labels}.items():
        if value is not None and len(value) != len(candidates):
            raise ValueError(f"`{name}` has {len(value)} rows, but there are {len(candidates)} pairs: give one each.")
    candidates, image_embeds, text_embeds, train_image, train_text = (
        x.detach().to("cpu", torch.float64)
        for x in (candidates, image_embeds, text_embeds, train_image_embeds, train_text_embeds)
    )
    norm_ratio = (candidates[:, 0].norm(dim=1).mean() / image_embeds.norm(dim=1).mean()).item()
    candidates, image_embeds, text_embeds, train_image, train_text = (
        normalize(x, dim=-1) for x in (candidates, image_embeds, text_embeds, train_image, train_text)
    )

    # 1. Predictions and baselines
    gap = (train_image - train_text).mean(0)
    rows = {
        "": candidates[:, 0],
        "_true": image_embeds,
        "_text": text_embeds,
        "_text_gap": normalize(text_embeds + gap, dim=1),
        "_linear": normalize(linear_regression(train_text, train_image)(text_embeds), dim=1),
    }
    metrics = {"norm_ratio": norm_ratio}
    if labels is not None:
        labels = labels.cpu()
        known = labels >= 0
    for suffix, predicted in rows.items():
        if suffix != "_true":
            metrics[f"cos_true{suffix}"] = cosine_similarity(predicted, image_embeds).mean().item()
        metrics[f"cos_text{suffix}"] = cosine_similarity(predicted, text_embeds).mean().item()
        metrics[f"cos_shuffled{suffix}"] = cosine_similarity(predicted, image_embeds.roll(1, 0)).mean().item()
        other = train_image[: len(image_embeds)] if suffix == "_true" else predicted
        if len(other) > 1:
            metrics[f"frechet{suffix}"] = frechet_distance(other, image_embeds)
        if labels is not None and known.any():
            metrics[f"zero_shot_accuracy{suffix}"] = zero_shot_accuracy(predicted[known], class_embeds, labels[known])

    # 2. Several draws for a caption
    count = candidates.shape[1]
    if count > 1:
        to_text = cosine_similarity(candidates, text_embeds[:, None], dim=2)
        to_true = cosine_similarity(candidates, image_embeds[:, None], dim=2)
        chosen = to_text.argmax(1, keepdim=True)
        metrics[f"best_of_{count}_cos_text_gain"] = (to_text.gather(1, chosen).mean() - to_text.mean()).item()
        metrics[f"best_of_{count}_cos_true_gain"] = (to_true.gather(1, chosen).mean() - to_true.mean()).item()
        best = candidates[torch.arange(len(candidates)), chosen[:, 0]]
        metrics[f"best_of_{count}_frechet"] = frechet_distance(best, image_embeds)
        if "zero_shot_accuracy" in metrics:
            metrics[f"best_of_{count}_zero_shot_accuracy"] = zero_shot_accuracy(
                best[known], class_embeds, labels[known]
            )
        # the mean over pairs of different members of a set of m unit vectors is (|sum|^2 - m) / (m (m - 1))
        between = (candidates.sum(1).square().sum(1) - count) / (count * (count - 1))
        if captions is not None:
            _, group, size = captions.cpu().unique(dim=0, return_inverse=True, return_counts=True)
            sums = torch.zeros(len(size), image_embeds.shape[1], dtype=torch.float64).index_add_(
                0, group, image_embeds
            )
            true_between = ((sums.square().sum(1) - size) / (size * (size - 1)).clamp(min=1))[group]
            shared = size[group] > 1
            if shared.any():
                metrics["diversity_true"] = 1 - true_between[shared].mean().item()
                between = between[shared]
        metrics["diversity"] = 1 - between.mean().item()
    return metrics


def _check(**embeds: torch.Tensor) -> None:
    """Matrices of numbers with as many columns as the first."""
    first = next(iter(embeds))
    for name, value in embeds.items():
        if value.ndim != 2 or 0 in value.shape or value.shape[1] != embeds[first].shape[-1]:
            raise ValueError(
                f"`{name}` has shape {tuple(value.shape)}, but must be (number, dim) with the dim of `{first}` of "
                f"shape {tuple(embeds[first].shape)}: give embeddings of one CLIP."
            )
        if not value.isfinite().all():
            row = int((~value.isfinite()).any(1).nonzero()[0])
            raise ValueError(f"row {row} of `{name}` holds values that are not finite.")
