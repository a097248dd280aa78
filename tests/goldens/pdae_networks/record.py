"""Records `networks.npz` and `networks.json` from a checkout of the authors' code, see README.md.

python tests/goldens/pdae_networks/record.py PATH_OF_THE_CHECKOUT
"""

import json
import math
import sys
from pathlib import Path

import numpy as np

_UNET = {
    "dropout": 0.0,
    "dims": 2,
    "num_heads": 1,
    "head_channel": -1,
    "use_new_attention_order": False,
    "num_residual_blocks_of_a_block": 1,
}
# name -> class, arguments, image size
NETWORKS = {
    "decoder_heads": (
        "ShiftUNet",
        _UNET
        | {"input_channel": 3, "base_channel": 32, "channel_multiplier": [1, 2], "attention_resolutions": [2]}
        | {"num_heads": 2, "latent_dim": 8},
        16,
    ),
    "decoder_head_channel": (
        "ShiftUNet",
        _UNET
        | {"input_channel": 1, "base_channel": 32, "channel_multiplier": [1, 1, 2], "attention_resolutions": [2, 4]}
        | {"num_residual_blocks_of_a_block": 2, "head_channel": 16, "use_new_attention_order": True, "latent_dim": 6},
        16,
    ),
    "base": (
        "UNet",
        _UNET | {"input_channel": 1, "base_channel": 32, "channel_multiplier": [1, 2], "attention_resolutions": [1]},
        16,
    ),
    "base_classes": (
        "UNet",
        _UNET
        | {"input_channel": 1, "base_channel": 32, "channel_multiplier": [1], "attention_resolutions": []}
        | {"num_class": 5},
        8,
    ),
    "encoder64": ("CELEBA64Encoder", {"latent_dim": 8}, 64),
    "encoder128": ("FFHQEncoder", {"latent_dim": 6}, 128),
}


def draw(name: str, shapes: dict[str, list[int]]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The weights and the inputs of one network, float32, from a stream of numbers that NumPy keeps frozen."""
    _, arguments, size = NETWORKS[name]
    stream = np.random.RandomState(list(NETWORKS).index(name))
    weights = {}
    for key in sorted(shapes):
        values = stream.uniform(-1, 1, shapes[key])
        if len(shapes[key]) > 1:
            values *= math.sqrt(3 / math.prod(shapes[key][1:]))  # keeps the variance of what passes through
        else:
            values = (1 if key.endswith(".weight") else 0) + 0.2 * values
        weights[key] = values.astype(np.float32)
    inputs = {
        "sample": stream.uniform(-1, 1, (2, arguments.get("input_channel", 3), size, size)).astype(np.float32),
        "timestep": np.array([3, 700]),
        "latent_code": stream.uniform(-1, 1, (2, arguments.get("latent_dim", 1))).astype(np.float32),
        "class_labels": np.array([4, 1]),
    }
    return weights, inputs


def main(checkout: str) -> None:
    sys.path.insert(0, checkout)
    import torch
    from diffusion.gaussian_diffusion import GaussianDiffusion
    from model.representation_learning import encoder
    from model.shift_unet import ShiftUNet
    from model.unet import UNet

    torch.set_num_threads(1)
    classes = vars(encoder) | {"ShiftUNet": ShiftUNet, "UNet": UNet}
    recorded, shapes, networks = {}, {}, {}
    for name, (class_name, arguments, _) in NETWORKS.items():
        network = networks[name] = classes[class_name](**arguments).eval()
        shapes[name] = {key: list(value.shape) for key, value in network.state_dict().items()}
        weights, inputs = draw(name, shapes[name])
        network.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
        sample, timestep, latent_code, class_labels = (torch.from_numpy(value) for value in inputs.values())
        with torch.no_grad():
            if class_name == "ShiftUNet":
                recorded[f"{name}.noise_pred"], recorded[f"{name}.gradient"] = network(sample, timestep, latent_code)
            elif class_name == "UNet":
                recorded[f"{name}.noise_pred"] = network(sample, timestep, class_labels)
            else:
                recorded[f"{name}.latent_code"] = network(sample)
    # The whole road: code, 2 deterministic steps to the noise, 3 back.
    diffusion = GaussianDiffusion({"timesteps": 1000, "betas_type": "linear"}, device="cpu")
    image = torch.from_numpy(draw("encoder64", shapes["encoder64"])[1]["sample"])[:1]
    with torch.no_grad():
        images = diffusion.representation_learning_autoencoding(
            "ddim2", "ddim3", networks["encoder64"], networks["decoder_heads"], image
        )
    recorded["autoencoded"] = images[:, :, ::4, ::4]  # every fourth pixel of every fourth row

    folder = Path(__file__).parent
    np.savez_compressed(folder / "networks.npz", **{key: value.numpy() for key, value in recorded.items()})
    text = json.dumps(shapes, separators=(",", ":")).replace('},"', '},\n"')
    (folder / "networks.json").write_text(text + "\n", encoding="utf-8")
    for key, value in recorded.items():
        print(key, tuple(value.shape), f"rms {value.square().mean().sqrt():.3f}")


if __name__ == "__main__":
    main(sys.argv[1])
