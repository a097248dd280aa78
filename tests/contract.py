"""What every pipeline of this package owes its user, as tests. Inherit, say what to build and how to call it."""

import inspect
import io
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image


@contextmanager
def no_model_runs(pipe):
    """Fails if any layer of any component is called in the block: bad input is refused before that."""
    calls = []
    layers = [
        layer for model in pipe.components.values() if isinstance(model, torch.nn.Module) for layer in model.modules()
    ]
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args: calls.append(type(layer).__name__)) for layer in layers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    assert not calls, f"{calls[0]} ran before the input was refused"


class PipelineContract:
    """
    Subclasses set `pipeline_class` and `image_shape` (channels, height, width) and define `components()`, new ones at
    tiny sizes, and `inputs(batch_size)`, the arguments of a call except `generator` and the general ones, the same
    every time; tensors and lists in it are batched.
    """

    pipeline_class: type[DiffusionPipeline]
    image_shape: tuple[int, int, int]

    def components(self):
        raise NotImplementedError

    def inputs(self, batch_size):
        raise NotImplementedError

    @pytest.fixture
    def pipe(self):
        torch.manual_seed(0)
        pipe = self.pipeline_class(**self.components())
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def run(self, pipe, batch_size=2, **changes):
        """The images (`output_type="pt"`) of a call with one generator per image."""
        generator = [torch.Generator().manual_seed(i) for i in range(batch_size)]
        inputs = self.inputs(batch_size) | {"generator": generator, "output_type": "pt"}
        return pipe(**(inputs | changes))[0]

    # -- saving, loading, sharing

    @pytest.mark.parametrize("by", ["its own class", "DiffusionPipeline"])
    def test_saved_pipeline_is_the_same(self, pipe, tmp_path, by):
        pipe.save_pretrained(tmp_path)
        loaded = (self.pipeline_class if by == "its own class" else DiffusionPipeline).from_pretrained(tmp_path)
        assert type(loaded) is self.pipeline_class
        assert loaded.components.keys() == pipe.components.keys()
        for name, part in pipe.components.items():
            again = loaded.components[name]
            assert type(again) is type(part)
            if isinstance(part, torch.nn.Module):
                state = again.state_dict()
                assert state.keys() == part.state_dict().keys()
                assert all(torch.equal(value, state[key]) for key, value in part.state_dict().items())
        loaded.set_progress_bar_config(disable=True)
        # In single precision the last bits depend on how the weights lie in memory.
        images = self.run(loaded.to(torch.float64))
        torch.testing.assert_close(images, self.run(pipe.to(torch.float64)), rtol=1e-9, atol=1e-9)

    def test_from_pipe_shares_the_components(self, pipe):
        pipe.to(torch.bfloat16)
        other = self.pipeline_class.from_pipe(pipe)
        for name, part in pipe.components.items():
            if isinstance(part, torch.nn.Module):
                assert getattr(other, name) is part and part.dtype == torch.bfloat16

    def test_components_make_the_pipeline_again(self, pipe):
        other = self.pipeline_class(**pipe.components)
        other.set_progress_bar_config(disable=True)
        assert torch.equal(self.run(other), self.run(pipe))

    # -- outputs

    def test_tuple_and_output_class(self, pipe):
        output = pipe(**self.inputs(2), generator=torch.Generator().manual_seed(0), output_type="pt")
        parts = pipe(**self.inputs(2), generator=torch.Generator().manual_seed(0), output_type="pt", return_dict=False)
        assert isinstance(output, BaseOutput) and type(parts) is tuple
        assert len(parts) == len(output.to_tuple())
        assert all(torch.equal(a, b) for a, b in zip(parts, output.to_tuple(), strict=True))

    def test_output_types(self, pipe):
        channels, height, width = self.image_shape
        tensor = self.run(pipe)
        assert tensor.shape == (2, channels, height, width)
        assert 0 <= tensor.min() < tensor.max() <= 1
        array = self.run(pipe, output_type="np")
        assert isinstance(array, np.ndarray)
        np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
        images = self.run(pipe, output_type="pil")
        assert all(isinstance(image, Image.Image) and image.size == (width, height) for image in images)
        pixels = np.stack([np.asarray(image).reshape(height, width, channels) for image in images])
        np.testing.assert_array_equal(pixels, np.round(array * 255).astype(np.uint8))
        with pytest.raises(ValueError, match="`output_type` is 'jpeg'.*'pil'"), no_model_runs(pipe):
            self.run(pipe, output_type="jpeg")

    def test_images_carry_no_graph(self, pipe):
        with torch.enable_grad():
            assert not self.run(pipe).requires_grad

    # -- randomness

    def test_same_seed_same_images(self, pipe):
        first, again, other = (
            pipe(**self.inputs(2), generator=torch.Generator().manual_seed(seed), output_type="pt")[0]
            for seed in (0, 0, 1)
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_a_generator_leaves_the_global_one_alone(self, pipe):
        before = torch.get_rng_state()
        self.run(pipe)
        assert torch.equal(torch.get_rng_state(), before)

    def test_a_batch_equals_single_calls(self, pipe):
        pipe.to(torch.float64)
        inputs = self.inputs(3)
        batch = self.run(pipe, 3)
        for i in range(3):
            one = {k: v[i : i + 1] if isinstance(v, torch.Tensor | list) else v for k, v in inputs.items()}
            single = self.run(pipe, 1, **one, generator=torch.Generator().manual_seed(i))
            torch.testing.assert_close(single[0], batch[i], rtol=1e-9, atol=1e-9)
        assert not torch.allclose(batch[0], batch[1])

    def test_wrong_number_of_generators(self, pipe):
        with pytest.raises(ValueError, match="`generator` is a list of 3 for a batch of 2"), no_model_runs(pipe):
            self.run(pipe, generator=[torch.Generator()] * 3)

    # -- callbacks and progress

    def test_callback_sees_every_step(self, pipe):
        calls = []

        def callback(pipe, step, timestep, tensors):
            calls.append((pipe, step, timestep, tensors))

        names = pipe._callback_tensor_inputs
        images = self.run(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
        assert torch.equal(images, self.run(pipe)), "a callback that returns nothing changes nothing"
        assert [step for _, step, _, _ in calls] == list(range(len(calls))) and calls
        timesteps = [int(timestep) for _, _, timestep, _ in calls]
        assert timesteps == sorted(timesteps, reverse=True)
        assert all(who is pipe and set(tensors) == set(names) for who, _, _, tensors in calls)

    def test_callback_can_replace_the_latents(self, pipe):
        def callback(pipe, step, timestep, tensors):
            return {"latents": tensors["latents"] + 0.1}

        assert not torch.allclose(self.run(pipe, callback_on_step_end=callback), self.run(pipe), atol=1e-3)

    def test_unknown_callback_tensor(self, pipe):
        unknown = {"callback_on_step_end": lambda *args: {}, "callback_on_step_end_tensor_inputs": ["nosuch"]}
        message = "`callback_on_step_end_tensor_inputs`.*nosuch.*latents"
        with pytest.raises(ValueError, match=message), no_model_runs(pipe):
            self.run(pipe, **unknown)

    def test_one_progress_bar(self, pipe):
        screen = io.StringIO()
        pipe.set_progress_bar_config(file=screen, disable=False)
        self.run(pipe)
        assert screen.getvalue().count("\n") == 1, "one bar, which stays on the screen"
        assert "100%" in screen.getvalue()

    # -- numbers

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_half_precision(self, pipe, dtype):
        expected = self.run(pipe)
        pipe.to(dtype)
        images = self.run(pipe)
        assert images.isfinite().all()
        assert (images.float() - expected).abs().mean() < 0.05

    def test_double_precision(self, pipe):
        expected = self.run(pipe)
        # The draws of one seed differ between dtypes beyond rounding: only what holds for any noise is checked.
        images = self.run(pipe.to(torch.float64))
        assert images.dtype == torch.float64 and images.shape == expected.shape and images.isfinite().all()

    # -- what a call leaves behind

    def test_components_are_left_as_they_were(self, pipe):
        models = [model for model in pipe.components.values() if isinstance(model, torch.nn.Module)]
        for i, model in enumerate(models):
            model.train(i % 2 == 0).requires_grad_(i % 2 == 1)
        before = [({k: v.clone() for k, v in model.state_dict().items()}, model.training) for model in models]
        self.run(pipe)
        for i, (model, (state, training)) in enumerate(zip(models, before, strict=True)):
            assert model.training is training
            assert all(p.requires_grad is (i % 2 == 1) and p.grad is None for p in model.parameters())
            assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

    def test_inputs_are_left_as_they_were(self, pipe):
        inputs, copies = self.inputs(2), self.inputs(2)
        self.run(pipe, **inputs)
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, copies[name]), name

    # -- signature

    def test_general_arguments_have_the_usual_names(self):
        parameters = inspect.signature(self.pipeline_class.__call__).parameters
        for name in ("num_inference_steps", "generator", "output_type", "return_dict", "callback_on_step_end"):
            assert name in parameters
        assert parameters["output_type"].default == "pil" and parameters["return_dict"].default is True

    def test_every_public_argument_is_annotated_and_documented(self):
        methods = {
            name: method
            for name, method in vars(self.pipeline_class).items()
            if inspect.isfunction(method) and (name == "__call__" or not name.startswith("_"))
        }
        assert "__call__" in methods
        for name, method in methods.items():
            signature = inspect.signature(method)
            assert signature.return_annotation is not inspect.Signature.empty, name
            for argument, parameter in signature.parameters.items():
                if argument != "self":
                    assert parameter.annotation is not inspect.Parameter.empty, f"{name}({argument})"
                    assert argument in method.__doc__, f"{name}({argument}) is not documented"
