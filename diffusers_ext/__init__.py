"""Diffusers plugins that make pretrained diffusion models represent and obey.

Public names are imported on first use. What `import diffusers_ext` does at once: it lets the plain
`DiffusionPipeline.from_pretrained` find the pipelines of this package by the class name in a repo's `model_index.json`
(see [`hub.dispatch`]); `DIFFUSERS_EXT_NO_DISPATCH=1` in the environment turns that off.
"""

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

# public name -> the module that defines it
_PUBLIC = {
    "ADMUNet2DModel": "pipelines.classifier_guidance",
    "ClassifierGradient": "pipelines.classifier_guidance",
    "ClassifierGuidanceGuider": "pipelines.classifier_guidance",
    "ClassifierGuidancePipeline": "pipelines.classifier_guidance",
    "ClipGuidance": "pipelines.classifier_guidance",
    "CoPaintPipeline": "pipelines.copaint",
    "CoPaintScheduler": "pipelines.copaint",
    "CoPaintStableDiffusionPipeline": "pipelines.copaint_stable_diffusion",
    "DDNMPipeline": "pipelines.ddnm",
    "DDNMScheduler": "pipelines.ddnm",
    "DDRMPipeline": "pipelines.ddrm",
    "DDRMScheduler": "pipelines.ddrm",
    "DPSPipeline": "pipelines.dps",
    "DPSScheduler": "pipelines.dps",
    "GlidePipeline": "pipelines.glide",
    "GlideTextEncoder": "pipelines.glide",
    "GuidedScheduler": "pipelines.classifier_guidance",
    "HubMixin": "hub",
    "MCGPipeline": "pipelines.mcg",
    "MCGScheduler": "pipelines.mcg",
    "NoisyClassifier": "pipelines.classifier_guidance",
    "PDAEEncoder": "pipelines.pdae",
    "PDAEGapOutput": "pipelines.pdae",
    "PDAEGradientEstimator": "pipelines.pdae",
    "PDAEPipeline": "pipelines.pdae",
    "PDAEPipelineOutput": "pipelines.pdae",
    "PDAEScheduler": "pipelines.pdae",
    "PDAESchedulerOutput": "pipelines.pdae",
    "PSLDPipeline": "pipelines.psld",
    "RePaintDDPMPipeline": "pipelines.repaint",
    "RePaintDDPMScheduler": "pipelines.repaint",
    "ReSamplePipeline": "pipelines.resample",
    "ReplacementPipeline": "pipelines.replacement",
    "ReplacementScheduler": "pipelines.replacement",
    "TrainingArguments": "training_run",
    "TrainingRun": "training_run",
    "UnCLIPDecoderScheduler": "pipelines.unclip",
    "UnCLIPImageProjection": "pipelines.unclip",
    "UnCLIPPriorPipeline": "pipelines.unclip_prior",
    "UnCLIPPriorTransformer": "pipelines.unclip_prior",
    "UnCLIPTextToImagePipeline": "pipelines.unclip",
    "VESDEPipeline": "pipelines.ve_sde",
    "VESDEScheduler": "pipelines.ve_sde",
    "dispatch": "hub",
    "load_image_dataset": "data",
}
__all__ = ["__version__", *_PUBLIC]

# In a checkout the method folders lie beside the package, in an installed package inside it. Python finds the second
# case (and an editable install) by itself; this finds the first, when the checkout's root is on the path.
for _folder in ("pipelines", "training", "model_cards"):
    _init = Path(__file__).parents[1] / _folder / "__init__.py"
    _name = f"{__name__}.{_folder}"
    if importlib.util.find_spec(_name) is None and _init.is_file():
        _spec = importlib.util.spec_from_file_location(_name, _init, submodule_search_locations=[str(_init.parent)])
        _module = importlib.util.module_from_spec(_spec)
        sys.modules[_name] = _module
        _spec.loader.exec_module(_module)
        globals()[_folder] = _module


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Dispatch imports diffusers, which takes seconds: the console command does it once it knows that it has work to do.
_is_console_command = [Path(word).stem for word in sys.argv[:1]] == ["diffusers-ext"]
if os.environ.get("DIFFUSERS_EXT_NO_DISPATCH", "") not in ("1", "true", "yes") and not _is_console_command:
    importlib.import_module(f"{__name__}.hub").dispatch()
