r"""Inpainting on priors whose posterior is known: how close are a method's samples to what they should be?

Without weights and without pictures to judge by eye: if the images follow a Gaussian mixture, the noise prediction of
a perfect diffusion model is known in closed form at every level ([`AnalyticUNet`], which any diffusers pipeline
takes), and so is the distribution of the unknown pixels given the known ones ([`GaussianMixture.condition`]).
[`inpainting_problems`] has images with holes from two such priors, [`posterior_metrics`] compares samples with the
exact posterior, [`count_passes`] counts what they cost. `benchmarks/inpainting_posterior.py` compares methods by them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from diffusers import ModelMixin, SchedulerMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from sklearn.datasets import load_digits
from torch.distributions import MultivariateNormal

from diffusers_ext.pipelines.copaint import CoPaintScheduler

# ------------------------------------------------------------------------------------------------------------- prior


@dataclass(frozen=True)
class GaussianMixture:
    r"""
    `p(x) = sum_k w_k N(x; mu_k, Sigma_k)`, in float64.

    Args:
        weights (`torch.Tensor`): `w_k`, not negative, with sum 1, shape `(components,)`.
        means (`torch.Tensor`): `mu_k`, shape `(components, dimensions)`.
        covariances (`torch.Tensor`): `Sigma_k`, positive definite, shape `(components, dimensions, dimensions)`.

    Raises:
        ValueError: For shapes that do not fit, weights that are no distribution and covariances that are not positive
            definite.

    Example:

    ```py
    >>> import torch
    >>> from diffusers_ext.evaluation.posterior import GaussianMixture

    >>> covariance = torch.tensor([[[1.0, 0.5], [0.5, 1.0]]])
    >>> prior = GaussianMixture(torch.ones(1), torch.zeros(1, 2), covariance)
    >>> posterior = prior.condition(torch.tensor([True, False]), torch.tensor([2.0]))
    >>> posterior.mean, posterior.covariance  # of the second number, given that the first is 2
    (tensor([1.], dtype=torch.float64), tensor([[0.7500]], dtype=torch.float64))

    ```
    """

    weights: torch.Tensor
    means: torch.Tensor
    covariances: torch.Tensor

    def __post_init__(self) -> None:
        for name in ("weights", "means", "covariances"):
            object.__setattr__(self, name, getattr(self, name).double())
        shapes = [tuple(x.shape) for x in (self.weights, self.means, self.covariances)]
        if self.means.ndim != 2 or shapes[0] != shapes[1][:1] or shapes[2] != (*shapes[1], shapes[1][-1]):
            raise ValueError(
                f"`weights`, `means` and `covariances` have shapes {shapes}, but they must be (components,), "
                "(components, dimensions) and (components, dimensions, dimensions)."
            )
        if not (self.weights.min() >= 0 and abs(self.weights.sum() - 1) < 1e-6):
            raise ValueError(
                f"`weights` has the minimum {self.weights.min():.4g} and the sum {self.weights.sum():.6g}, but must "
                "not be negative and must sum to 1: divide them by their sum."
            )
        if torch.linalg.cholesky_ex(self.covariances).info.any() or not torch.allclose(
            self.covariances, self.covariances.mT, atol=1e-8
        ):
            raise ValueError(
                "`covariances` are not all symmetric and positive definite: add a small multiple of the identity."
            )

    @cached_property
    def _components(self) -> MultivariateNormal:
        return MultivariateNormal(self.means, self.covariances)

    @property
    def mean(self) -> torch.Tensor:
        """Mean of the whole mixture, shape `(dimensions,)`."""
        return self.weights @ self.means

    @property
    def covariance(self) -> torch.Tensor:
        """Covariance of the whole mixture, shape `(dimensions, dimensions)`."""
        centered = self.means - self.mean
        return torch.einsum("k,kij->ij", self.weights, self.covariances + centered[:, :, None] * centered[:, None])

    def _joint_log_prob(self, samples: torch.Tensor) -> torch.Tensor:
        return self.weights.log() + self._components.log_prob(samples.double()[:, None])

    def log_prob(self, samples: torch.Tensor) -> torch.Tensor:
        """`log p(x)` of each sample, shape `(batch, dimensions)` to `(batch,)`."""
        return self._joint_log_prob(samples).logsumexp(1)

    def responsibilities(self, samples: torch.Tensor) -> torch.Tensor:
        """`p(k | x)` of each sample, shape `(batch, dimensions)` to `(batch, components)`."""
        return self._joint_log_prob(samples).softmax(1)

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """
        Independent samples.

        Args:
            num_samples (`int`): How many.
            generator (`torch.Generator`, *optional*): Source of the random numbers.

        Returns:
            `torch.Tensor`: float64 of shape `(num_samples, dimensions)`.
        """
        components = self.weights.multinomial(num_samples, replacement=True, generator=generator)
        noise = torch.randn(num_samples, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[components] + (self._components.scale_tril[components] @ noise[..., None])[..., 0]

    def condition(self, known: torch.Tensor, values: torch.Tensor) -> "GaussianMixture":
        r"""
        The exact posterior `p(x_u | x_o)` of the unknown numbers given the known ones, again a mixture: with
        `G_k = Sigma_uo Sigma_oo^-1` of each component, `mu_u + G_k (x_o - mu_o)` and `Sigma_uu - G_k Sigma_ou`, with
        weights proportional to `w_k N(x_o; mu_o, Sigma_oo)`.

        Args:
            known (`torch.Tensor`): Which numbers are known, boolean of shape `(dimensions,)`.
            values (`torch.Tensor`): `x_o`, in their order, shape `(number of known,)`.

        Raises:
            ValueError: If nothing or everything is known, or if the shapes do not fit.
        """
        known = known.bool()
        if known.shape != self.means.shape[1:] or values.shape != (int(known.sum()),):
            raise ValueError(
                f"`known` has shape {tuple(known.shape)} with {int(known.sum())} known and `values` has shape "
                f"{tuple(values.shape)}, but the mixture has {self.means.shape[1]} dimensions: `known` needs one "
                "entry for each, `values` one for each that is known."
            )
        if known.all() or not known.any():
            raise ValueError("`known` is all True or all False: there must be both known and unknown numbers.")
        hidden, values = ~known, values.double()
        covariance_ou = self.covariances[:, known][:, :, hidden]
        covariance_oo = self.covariances[:, known][:, :, known]
        gain = torch.linalg.solve(covariance_oo, covariance_ou).mT
        means = self.means[:, hidden] + (gain @ (values - self.means[:, known])[..., None])[..., 0]
        covariances = self.covariances[:, hidden][:, :, hidden] - gain @ covariance_ou
        evidence = MultivariateNormal(self.means[:, known], covariance_oo).log_prob(values)
        weights = (self.weights.log() + evidence).softmax(0)
        return GaussianMixture(weights, means, (covariances + covariances.mT) / 2)


class AnalyticUNet(ModelMixin, ConfigMixin):
    r"""
    The network that a perfectly trained diffusion model on images from a Gaussian mixture would be. Its output is the
    exact noise prediction

    `eps(x, t) = sqrt(1 - abar) sum_k r_k(x) S_k^-1 (x - sqrt(abar) mu_k)` with `S_k = abar Sigma_k + (1 - abar) I`,

    where `r_k(x)` is the probability that the noisy image `x` is from component `k`, that is
    `eps = -sqrt(1 - abar) grad log p_t(x)`. It is called like a [`UNet2DModel`], has no parameters, can be
    differentiated in its sample, and is saved and loaded like other models. New ones are standard normal; see
    [`AnalyticUNet.from_mixture`].

    Args:
        sample_size (`int` or `(int, int)`, *optional*, defaults to 8): Height and width of the images in pixels.
        in_channels (`int`, *optional*, defaults to 1): Channels of the images.
        out_channels (`int`, *optional*, defaults to 1): The same number.
        num_components (`int`, *optional*, defaults to 1): Components of the mixture.
        num_train_timesteps (`int`, *optional*, defaults to 1000): As in the schedulers of diffusers.
        beta_start (`float`, *optional*, defaults to 1e-4): As there.
        beta_end (`float`, *optional*, defaults to 0.02): As there.
        beta_schedule (`str`, *optional*, defaults to `"linear"`): As there.
        trained_betas (`list[float]`, *optional*): As there.

    Raises:
        ValueError: If `out_channels` is not `in_channels`; for schedules that [`CoPaintScheduler`] refuses.

    Example:

    ```py
    >>> import torch
    >>> from diffusers import DDIMPipeline, DDPMScheduler
    >>> from diffusers_ext.evaluation.posterior import AnalyticUNet, GaussianMixture

    >>> means = 0.5 * torch.tensor([[1.0] * 16, [-1.0] * 16])
    >>> mixture = GaussianMixture(torch.tensor([0.75, 0.25]), means, 0.01 * torch.eye(16).expand(2, 16, 16))
    >>> pipe = DDIMPipeline(AnalyticUNet.from_mixture(mixture, (1, 4, 4)), DDPMScheduler())
    >>> generator = torch.Generator().manual_seed(0)
    >>> images = pipe(batch_size=200, num_inference_steps=50, generator=generator, output_type="np").images
    >>> share = (images.mean((1, 2, 3)) > 0.5).mean()  # of the first component
    >>> print(0.65 < share < 0.85)
    True

    ```
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 8,
        in_channels: int = 1,
        out_channels: int = 1,
        num_components: int = 1,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
    ) -> None:
        super().__init__()
        if out_channels != in_channels:
            raise ValueError(f"`out_channels` is {out_channels}, but must be `in_channels`={in_channels}.")
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        dimensions = in_channels * height * width
        self.register_buffer("weights", torch.full((num_components,), 1 / num_components))
        self.register_buffer("means", torch.zeros(num_components, dimensions))
        # Sigma_k = V_k diag(lambda_k) V_k^T: every S_k has the same eigenvectors.
        self.register_buffer("eigenvalues", torch.ones(num_components, dimensions))
        self.register_buffer("eigenvectors", torch.eye(dimensions).repeat(num_components, 1, 1))
        # Not a buffer: in float32, 1 - abar_0 would be wrong by 0.1 %.
        self.alphas_cumprod = CoPaintScheduler(
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            trained_betas=trained_betas,
        ).alphas_cumprod

    @classmethod
    def from_mixture(
        cls,
        mixture: GaussianMixture,
        image_shape: tuple[int, int, int],
        scheduler: SchedulerMixin | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "AnalyticUNet":
        r"""
        The network for images from a mixture.

        Args:
            mixture ([`GaussianMixture`]): The distribution of the images, flattened, in model space [-1, 1].
            image_shape (`(int, int, int)`): `(channels, height, width)` of the images.
            scheduler (a scheduler of diffusers, *optional*): Whose noise schedule it is for, by default DDPM's.
            dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Of the network, which it computes in.

        Raises:
            ValueError: If the mixture has not the dimensions of the images.
        """
        channels, height, width = image_shape
        components, dimensions = mixture.means.shape
        if dimensions != channels * height * width:
            raise ValueError(
                f"`mixture` has {dimensions} dimensions, but `image_shape` is {tuple(image_shape)}, which needs "
                f"{channels * height * width}."
            )
        names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
        schedule = {} if scheduler is None else {name: scheduler.config[name] for name in names}
        model = cls(
            sample_size=height if height == width else (height, width),
            in_channels=channels,
            out_channels=channels,
            num_components=components,
            **schedule,
        )
        eigenvalues, eigenvectors = torch.linalg.eigh(mixture.covariances)
        model.weights, model.means = mixture.weights.to(dtype), mixture.means.to(dtype)
        model.eigenvalues, model.eigenvectors = eigenvalues.to(dtype), eigenvectors.to(dtype).contiguous()
        return model.eval()

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        r"""
        The expected noise in noisy images.

        Args:
            sample (`torch.Tensor`): `x_t`, shape `(batch, channels, height, width)`, of the model's dtype.
            timestep (`torch.Tensor`, `float` or `int`): `t`, one for all or of shape `(batch,)`.
            class_labels (`torch.Tensor`, *optional*): Must be left out: the mixture has no classes.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return a [`UNet2DOutput`].

        Raises:
            ValueError: For another image size, for timesteps outside of the schedule, for class labels, and for a
                model in half precision, in which levels of little noise cannot be told apart.
        """
        components, dimensions = self.means.shape
        if sample.ndim != 4 or sample[0].numel() != dimensions or sample.shape[1] != self.config.in_channels:
            raise ValueError(
                f"`sample` has shape {tuple(sample.shape)}, but the mixture is of images of "
                f"{self.config.in_channels} channels and {dimensions} numbers: give (batch, channels, height, width)."
            )
        if self.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"the model has dtype {self.dtype}, but must be in float32 or float64: `.to(...)` it.")
        if class_labels is not None:
            raise ValueError("`class_labels` were given, but this model takes none: leave them out.")
        timestep = torch.as_tensor(timestep).cpu().long()
        if timestep.min() < 0 or timestep.max() >= len(self.alphas_cumprod):
            raise ValueError(
                f"`timestep` is from {timestep.min()} to {timestep.max()}, but must be from 0 to "
                f"{len(self.alphas_cumprod) - 1}."
            )
        # Each level's matrices once; `place` is the level of each sample.
        timestep, place = timestep.reshape(-1).unique(return_inverse=True)
        level = self.alphas_cumprod[timestep]
        signal, abar, noise = (x.to(sample)[:, None, None] for x in (level.sqrt(), level, 1 - level))
        variances = abar * self.eigenvalues + noise  # eigenvalues of S_k, (levels, components, dimensions)
        log_determinants = variances.log().sum(-1)
        if len(timestep) > 1:
            place = place.to(sample.device)
            signal, noise, variances, log_determinants = (
                x[place] for x in (signal, noise, variances, log_determinants)
            )

        basis = self.eigenvectors.transpose(0, 1).reshape(dimensions, -1)  # all V_k side by side
        coordinates = (sample.flatten(1) @ basis).unflatten(1, (components, dimensions))
        coordinates = coordinates - signal * (self.means[:, None] @ self.eigenvectors)[:, 0]
        whitened = coordinates / variances
        logits = self.weights.log() - ((coordinates * whitened).sum(-1) + log_determinants) / 2
        probabilities = logits.softmax(-1)
        # By way of the expected clean image: in float32, the formula with the scores would leave errors in eps that
        # every prediction of a clean image multiplies by sqrt((1 - abar) / abar), 157 at the last level.
        clean = (probabilities[..., None] * self.eigenvalues * whitened).flatten(1) @ basis.T
        clean = probabilities @ self.means + signal[:, 0] * clean
        output = ((sample.flatten(1) - signal[:, 0] * clean) / noise[:, 0].sqrt()).reshape(sample.shape)
        return UNet2DOutput(sample=output) if return_dict else (output,)


# ---------------------------------------------------------------------------------------------------------- problems


@dataclass(frozen=True)
class InpaintingProblem:
    r"""
    An image with a hole, and what can be known about the hole.

    Args:
        name (`str`): What the problem is called.
        prior ([`GaussianMixture`]): The distribution of the flattened images, in [-1, 1].
        image (`torch.Tensor`): The image, float64 in [-1, 1], shape `(channels, height, width)`. Methods may use its
            known pixels only.
        known (`torch.Tensor`): Which pixels are known, boolean of shape `(1, height, width)`.
    """

    name: str
    prior: GaussianMixture
    image: torch.Tensor
    known: torch.Tensor

    @cached_property
    def posterior(self) -> GaussianMixture:
        """Exact distribution of the unknown pixels, flattened, given the known ones."""
        known = self.known.expand_as(self.image)
        return self.prior.condition(known.flatten(), self.image[known])

    @property
    def input_image(self) -> torch.Tensor:
        """What a pipeline takes as `image`: [0, 1], mid-grey where the pixels are not known."""
        return torch.where(self.known, self.image / 2 + 0.5, 0.5)

    @property
    def mask_image(self) -> torch.Tensor:
        """What a pipeline takes as `mask_image`: 1 where it shall repaint, float32 of shape `(1, height, width)`."""
        return (~self.known).float()


SUITES = ("digits", "digitsG", "gmm25", "gmm25_dy2")


def inpainting_problems(suite: str, seed: int) -> list[InpaintingProblem]:
    r"""
    Images with holes whose posterior is known. Equal seeds give equal problems.

    - `"digits"`: the 8 x 8 digits of scikit-learn as `0.35 (x - mean)`. Prior: one Gaussian for each of the ten
      classes, fitted to those four in five whose index is not a multiple of 5, plus `0.05^2 I`. Images: five of the
      others, with the masks half, expand, alternate lines, every second pixel in both directions, and box.
    - `"digitsG"`: the same images and masks, but one Gaussian for all classes.
    - `"gmm25"`: the 25 modes of MCGdiff (https://huggingface.co/papers/2308.07983), means `(8 i, 8 j, 8 i, ...) / 20`
      for i, j from -2 to 2 and standard deviation 1 / 20, in 8 dimensions (as images of 1 x 8 pixels), with random
      weights; eight problems with the first pixel known.
    - `"gmm25_dy2"`: the same with the first two pixels known, which tell the mode.

    Args:
        suite (`str`): One of the above.
        seed (`int`): Chooses the images, and the weights of the 25 modes.

    Raises:
        ValueError: For an unknown suite.

    Example:

    ```py
    >>> from diffusers_ext.evaluation.posterior import inpainting_problems

    >>> problem = inpainting_problems("gmm25", seed=0)[0]
    >>> problem.name, problem.known.sum().item(), problem.posterior.means.shape
    ('gmm25#0', 1, torch.Size([25, 7]))

    ```
    """
    if suite not in SUITES:
        raise ValueError(f"`suite` is {suite!r}, but must be one of {SUITES}.")
    if suite.startswith("gmm25"):
        generator = torch.Generator().manual_seed(seed)
        grid = torch.cartesian_prod(*[torch.arange(2.0, -3, -1, dtype=torch.float64)] * 2)
        means = 8 * grid.repeat(1, 4) / 20
        covariances = torch.eye(8, dtype=torch.float64).expand(25, 8, 8) / 20**2
        known = torch.zeros(1, 1, 8, dtype=torch.bool)
        known[..., : 2 if suite == "gmm25_dy2" else 1] = True
        problems = []
        for index in range(8):
            weights = torch.randn(25, generator=generator, dtype=torch.float64) ** 2
            prior = GaussianMixture(weights / weights.sum(), means, covariances)
            image = prior.sample(1, generator).reshape(1, 1, 8)
            problems.append(InpaintingProblem(f"{suite}#{index}", prior, image.clamp(-1, 1), known))
        return problems

    images, labels = (torch.from_numpy(x) for x in load_digits(return_X_y=True))
    held_out = torch.arange(len(images)) % 5 == 0
    images = images / 8 - 1
    images = 0.35 * (images - images[~held_out].mean(0))
    labels = torch.zeros_like(labels) if suite == "digitsG" else labels
    classes = [images[~held_out & (labels == label)] for label in labels.unique()]
    prior = GaussianMixture(
        torch.tensor([len(members) for members in classes], dtype=torch.float64) / int((~held_out).sum()),
        torch.stack([members.mean(0) for members in classes]),
        torch.stack([members.T.cov() + 0.05**2 * torch.eye(64, dtype=torch.float64) for members in classes]),
    )
    masks = {name: torch.zeros(1, 8, 8, dtype=torch.bool) for name in ("half", "expand", "altern", "sr2", "box")}
    masks["half"][..., :4] = True
    masks["expand"][:, 2:6, 2:6] = True
    masks["altern"][:, 1::2] = True
    masks["sr2"][:, 1::2, 1::2] = True
    masks["box"][:] = True
    masks["box"][:, 2:6, 2:6] = False
    places = (torch.tensor([6, 254, 39, 276, 69]) + seed) % int(held_out.sum())  # drawn once; each seed has the next
    indices = held_out.nonzero()[places, 0].tolist()
    return [
        InpaintingProblem(f"{name}/{index}", prior, images[index].reshape(1, 8, 8), known)
        for index, (name, known) in zip(indices, masks.items(), strict=True)
    ]


# ----------------------------------------------------------------------------------------------------------- metrics


def sliced_wasserstein(
    samples: torch.Tensor,
    reference: torch.Tensor,
    num_projections: int = 128,
    generator: torch.Generator | None = None,
) -> float:
    r"""
    Sliced Wasserstein distance of order 2 between two sets of equally many points: the root of the mean, over random
    directions of unit length, of the squared distances between the points' sorted coordinates in that direction.

    Args:
        samples (`torch.Tensor`): One set, shape `(number, dimensions)`.
        reference (`torch.Tensor`): The other set, of the same shape.
        num_projections (`int`, *optional*, defaults to 128): Number of directions.
        generator (`torch.Generator`, *optional*): Draws the directions.

    Raises:
        ValueError: If the shapes differ.

    Example:

    ```py
    >>> import torch
    >>> from diffusers_ext.evaluation.posterior import sliced_wasserstein

    >>> sliced_wasserstein(torch.zeros(5, 1), torch.full((5, 1), 3.0))
    3.0

    ```
    """
    if samples.shape != reference.shape or samples.ndim != 2:
        raise ValueError(
            f"`samples` has shape {tuple(samples.shape)} and `reference` {tuple(reference.shape)}, but both must have "
            "the same (number, dimensions)."
        )
    directions = torch.randn(samples.shape[1], num_projections, generator=generator, dtype=torch.float64)
    directions = directions / directions.norm(dim=0)
    projected, expected = ((points.double() @ directions).sort(0).values for points in (samples, reference))
    return (projected - expected).square().mean().sqrt().item()


def posterior_metrics(
    samples: torch.Tensor, problem: InpaintingProblem, generator: torch.Generator | None = None
) -> dict[str, float]:
    r"""
    How samples of an inpainting method compare with the exact posterior. All but the weights and the densities are
    in units of the posterior's standard deviation `sd`, the root of the mean variance of an unknown pixel.

    - `sliced_wasserstein`: to as many exact samples, 128 directions; see [`sliced_wasserstein`]. For exact samples it
      is not 0, because both sets are finite.
    - `mean_error`: root mean square, over unknown pixels, of the error of the samples' mean.
    - `variance_ratio`: total variance of the samples over that of the posterior.
    - `density_deficit`: mean log density of exact samples minus that of the samples, per unknown number: above 0 for
      samples that the posterior holds improbable, below 0 for samples that keep too close to its modes.
    - `weight_error`: total variation distance between the posterior's weights of its components and the mean
      probabilities of the components given the samples.
    - `known_error`: root mean square error of the known pixels.

    Args:
        samples (`torch.Tensor`): The method's whole images, in [-1, 1], shape `(batch, channels, height, width)`.
        problem ([`InpaintingProblem`]): What they are samples for.
        generator (`torch.Generator`, *optional*): Draws directions and exact samples; by default one with seed 0.

    Raises:
        ValueError: If the samples have another shape than the problem's image, or are less than two.

    Example:

    ```py
    >>> import torch
    >>> from diffusers_ext.evaluation.posterior import inpainting_problems, posterior_metrics

    >>> problem = inpainting_problems("digitsG", seed=0)[0]
    >>> metrics = posterior_metrics(problem.image.expand(4, 1, 8, 8), problem)
    >>> metrics["known_error"], metrics["variance_ratio"]
    (0.0, 0.0)

    ```
    """
    if samples.shape[1:] != problem.image.shape or len(samples) < 2:
        raise ValueError(
            f"`samples` has shape {tuple(samples.shape)}, but must be at least two images of the shape "
            f"{tuple(problem.image.shape)} of the problem's image."
        )
    generator = generator or torch.Generator().manual_seed(0)
    samples = samples.double().cpu()
    known = problem.known.expand_as(problem.image)
    hidden, posterior = samples[:, ~known], problem.posterior
    variance = posterior.covariance.trace()
    sd = (variance / hidden.shape[1]).sqrt().item()
    exact = posterior.sample(len(samples), generator)
    distance = sliced_wasserstein(hidden, exact, generator=generator)
    expected = posterior.log_prob(posterior.sample(4096, generator)).mean()
    weights = posterior.responsibilities(hidden).mean(0)
    return {
        "sliced_wasserstein": distance / sd,
        "mean_error": (hidden.mean(0) - posterior.mean).square().mean().sqrt().item() / sd,
        "variance_ratio": (hidden.var(0).sum() / variance).item(),
        "density_deficit": ((expected - posterior.log_prob(hidden).mean()) / hidden.shape[1]).item(),
        "weight_error": (weights - posterior.weights).abs().sum().item() / 2,
        "known_error": (samples[:, known] - problem.image[known]).square().mean().sqrt().item() / sd,
    }


@dataclass
class PassCount:
    """
    What [`count_passes`] counted so far.

    Args:
        forward (`int`): Forward passes, each of a whole batch.
        backward (`int`): Backward passes.
    """

    forward: int = 0
    backward: int = 0


@contextmanager
def count_passes(model: torch.nn.Module) -> Iterator[PassCount]:
    r"""
    Counts the passes through a model, whoever calls it: forward passes by the calls, backward passes by the gradients
    that come back to its outputs.

    Args:
        model (`torch.nn.Module`): A model whose output is a tuple or [`BaseOutput`] with a tensor in the first place.

    Example:

    ```py
    >>> import torch
    >>> from diffusers_ext.evaluation.posterior import AnalyticUNet, count_passes

    >>> model, sample = AnalyticUNet(), torch.zeros(3, 1, 8, 8, requires_grad=True)
    >>> with count_passes(model) as passes:
    ...     gradient = torch.autograd.grad(model(sample, 10).sample.sum(), sample)
    ...     with torch.no_grad():
    ...         output = model(sample, 10)
    >>> passes
    PassCount(forward=2, backward=1)

    ```
    """
    count = PassCount()

    def on_backward(gradient: torch.Tensor) -> None:
        count.backward += 1

    def on_forward(module: torch.nn.Module, args: tuple, output: tuple) -> None:
        count.forward += 1
        if output[0].requires_grad:
            output[0].register_hook(on_backward)

    handle = model.register_forward_hook(on_forward)
    try:
        yield count
    finally:
        handle.remove()
