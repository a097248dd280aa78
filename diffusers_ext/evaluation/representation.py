"""How much of the labels is in features, for a reader that can only draw straight lines."""

import logging

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, linear
from torchmetrics.functional.classification import multilabel_auroc, multilabel_average_precision

logger = logging.getLogger(__name__)


def linear_probe(
    features: torch.Tensor,
    labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    inverse_l2: float = 1.0,
    max_iterations: int = 1000,
) -> dict[str, float]:
    r"""
    Logistic regression on standardized features, scored on other ones.

    It minimizes `sum_i loss(W f_i + b, y_i) + |W|^2 / (2 inverse_l2)`, scikit-learn's objective with
    `C = inverse_l2`, by L-BFGS in float64 from zero: convex, hence the same on every machine. Several classes: softmax
    regression, two: one logit. Several labels per image (attributes): one independent regression each. The features'
    mean and standard deviation are those of `features`.

    Args:
        features (`torch.Tensor`): Features to fit on, shape `(num_samples, num_features)`.
        labels (`torch.Tensor`):
            Classes, integers of shape `(num_samples,)`; or attributes, 0 or 1 of shape `(num_samples, num_labels)`.
        test_features, test_labels (`torch.Tensor`): The same for the samples that are scored.
        inverse_l2 (`float`, *optional*, defaults to 1.0): Inverse strength of the L2 penalty on the weights.
        max_iterations (`int`, *optional*, defaults to 1000): Limit of L-BFGS; it warns when it is reached.

    Returns:
        `dict[str, float]`: For classes `accuracy`. For attributes `auroc` and `average_precision`, means over the
        labels that `test_labels` has both values of, whose number is `num_labels`.

    Raises:
        ValueError: For shapes that do not fit, values that are not finite, fewer than two classes, attributes that are
            not 0 or 1, and attributes of one value only.

    Example:

    ```py
    >>> import torch
    >>> from diffusers_ext.evaluation.representation import linear_probe

    >>> features = torch.tensor([[0.0, 5.0], [0.2, 5.0], [0.8, 5.0], [1.0, 5.0]])
    >>> test_features = torch.tensor([[0.1, 5.0], [0.6, 5.0]])
    >>> linear_probe(features, torch.tensor([3, 3, 7, 7]), test_features, torch.tensor([3, 7]))
    {'accuracy': 1.0}

    ```
    """
    for prefix, x, y in (("", features, labels), ("test_", test_features, test_labels)):
        if x.ndim != 2 or x.shape[1] != features.shape[1] or len(x) == 0:
            raise ValueError(
                f"`{prefix}features` has shape {tuple(x.shape)}, but must be (num_samples, num_features) with at "
                f"least one sample, and num_features as in `features` of shape {tuple(features.shape)}."
            )
        if y.ndim not in (1, 2) or len(y) != len(x) or y.shape[1:] != labels.shape[1:]:
            raise ValueError(
                f"`{prefix}labels` has shape {tuple(y.shape)}, but must be (num_samples,) or (num_samples, "
                f"num_labels) with the {len(x)} samples of `{prefix}features`, and num_labels as in `labels`."
            )
        if not x.isfinite().all():
            raise ValueError(f"`{prefix}features` holds values that are not finite: the probe cannot be fitted.")
        if y.ndim == 2 and not ((y == 0) | (y == 1)).all():
            raise ValueError(f"`{prefix}labels` holds values other than 0 and 1, but attributes have no others.")
    if inverse_l2 <= 0:
        raise ValueError(f"`inverse_l2` is {inverse_l2}, but must be above 0.")

    device = "cpu" if features.device.type == "mps" else features.device  # MPS has no float64
    mean, std = features.to(device, torch.float64).mean(0), features.to(device, torch.float64).std(0, correction=0)
    std[std <= 1e-12 * mean.abs()] = 1  # constant up to rounding: standardized to zero
    features, test_features = ((x.to(device, torch.float64) - mean) / std for x in (features, test_features))
    labels, test_labels = labels.to(device), test_labels.to(device)

    if labels.ndim == 1:
        classes, target = labels.unique(return_inverse=True)
        if len(classes) < 2:
            raise ValueError(f"`labels` holds the class {classes.tolist()} alone, but a probe needs at least two.")
        num_logits = len(classes) if len(classes) > 2 else 1
    else:
        target, num_logits = labels, labels.shape[1]
        constant = (target == target[0]).all(0).nonzero().flatten().tolist()
        if constant:
            raise ValueError(f"`labels` has one value only in the columns {constant}: leave them out.")
    if num_logits == 1 or labels.ndim == 2:
        target = target.to(torch.float64).reshape(len(features), num_logits)

    weight = torch.zeros(num_logits, features.shape[1], dtype=torch.float64, device=device, requires_grad=True)
    bias = torch.zeros(num_logits, dtype=torch.float64, device=device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        tolerance_grad=1e-7,
        tolerance_change=1e-14,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logits = linear(features, weight, bias)
        if target.ndim == 1:
            loss = cross_entropy(logits, target, reduction="sum")
        else:
            loss = binary_cross_entropy_with_logits(logits, target, reduction="sum")
        loss = (loss + weight.square().sum() / (2 * inverse_l2)) / len(features)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
        closure()
    slope = max(weight.grad.abs().max().item(), bias.grad.abs().max().item())
    if slope > 1e-4:
        logger.warning(
            "the linear probe has not converged (gradient %.1e after %d iterations): raise `max_iterations` or lower "
            "`inverse_l2`",
            slope,
            max_iterations,
        )

    logits = linear(test_features, weight, bias).detach()
    if labels.ndim == 1:
        place = logits.argmax(1) if num_logits > 1 else (logits[:, 0] > 0).long()
        return {"accuracy": (classes[place] == test_labels).double().mean().item()}
    scored = ~(test_labels == test_labels[0]).all(0)  # with one value there is no curve
    num_labels = int(scored.sum())
    if num_labels == 0:
        raise ValueError("`test_labels` has one value only in every column: give it both.")
    # torchmetrics takes scores in [0, 1]
    arguments = (logits[:, scored].sigmoid(), test_labels[:, scored].long(), num_labels)
    return {
        "auroc": multilabel_auroc(*arguments).item(),
        "average_precision": multilabel_average_precision(*arguments).item(),
        "num_labels": num_labels,
    }
