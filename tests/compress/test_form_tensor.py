import pytest
import torch
from torch import Tensor, nn

from dcomp.calibrate.pipeline import prediction_of
from dcomp.calibrate.structure import Role, probe_structure
from dcomp.compress.form_tensor import FormMemory, FormTensor
from tests.support.sweep import sweep
from tests.support.tiny import FEW_NAMES, NAMES, denoiser_inputs, tiny_denoiser


@pytest.mark.parametrize("name", sweep(NAMES, FEW_NAMES))
def test_only_layers_that_read_no_latents_and_no_text_have_values(name: str) -> None:
    denoiser = tiny_denoiser(name).eval()
    args, kwargs = denoiser_inputs(name)
    structure = probe_structure(denoiser, args, kwargs)
    formed = tuple(FormTensor.of(x) if number == 0 else x for number, x in enumerate(args))
    texts = {key: FormTensor.of(x) if key.startswith("encoder_hidden") else x for key, x in kwargs.items()}
    texts |= {"hidden_states": FormTensor.of(kwargs["hidden_states"])} if "hidden_states" in kwargs else {}
    if name.startswith("UNet2DCondition"):  # its text is positional
        formed = (formed[0], formed[1], *(FormTensor.of(x) for x in formed[2:]))
    seen: dict[str, Tensor] = {}
    for path, layer in denoiser.named_modules():
        if path in structure.layers:
            layer.register_forward_hook(lambda *run, path=path: seen.update({path: run[-1]}))
    with torch.no_grad():
        formless = prediction_of(denoiser(*formed, **texts))
        found = {path: output.shape for path, output in seen.items()}
        real = {path for path, output in seen.items() if not isinstance(output, FormTensor)}
        expected = prediction_of(denoiser(*args, **kwargs))
    assert isinstance(formless, FormTensor)
    assert (formless.shape, formless.dtype, formless.device) == (expected.shape, expected.dtype, expected.device)
    assert found == {path: output.shape for path, output in seen.items()}
    assert real == structure.named(Role.TIME, Role.MODULATION)


def test_a_form_has_no_memory_and_no_value() -> None:
    form = FormTensor.of(torch.ones(2, 3, dtype=torch.float16), rows=1 << 40)
    assert (form.shape, form.dtype, form.device.type) == ((1 << 40, 3), torch.float16, "cpu")
    with pytest.raises(RuntimeError):
        form.flatten()[0].item()


def test_whatever_a_form_takes_part_in_is_a_form_and_nothing_else_is() -> None:
    form, real = FormTensor.of(torch.ones(4, 3)), torch.ones(3)
    for result in (form * real, real + form, torch.cat([form, torch.ones(1, 3)]), form.sum(), form.to(torch.float64)):
        assert isinstance(result, FormTensor)
    assert (form.T.shape, form.T.stride(), form.double().dtype) == ((3, 4), (1, 3), torch.float64)
    assert type(real.expand(len(form), 3) * 2) is Tensor
    assert type(torch.zeros(form.shape, device=form.device)) is Tensor
    assert form.to("meta").device.type == "meta"


def test_a_form_that_is_changed_in_place_stays_itself() -> None:
    form = FormTensor.of(torch.ones(4, 3))
    same = form
    same += torch.ones(3)
    assert same is form
    assert form.mul_(2) is form


def test_a_module_runs_once_for_inputs_of_one_form() -> None:
    class Counting(nn.Module):
        runs = 0

        def forward(self, x: Tensor, factor: float, *, pair: bool = False) -> tuple[Tensor, ...] | Tensor:
            self.runs += 1
            return (x * factor, x[:, :1]) if pair else x * factor

    module = Counting()
    answer = FormMemory().answer(module)
    forms = [FormTensor.of(torch.ones(rows, 3)) for rows in (2, 2, 5)]
    assert [answer(form, 2.0).shape for form in forms] == [(2, 3), (2, 3), (5, 3)]
    assert module.runs == 2
    assert [tuple(part.shape) for part in answer(forms[0], 2.0, pair=True)] == [(2, 3), (2, 1)]
    answer(forms[0], 3.0)
    assert module.runs == 4
    assert torch.equal(answer(torch.ones(1, 3), 2.0), torch.full((1, 3), 2.0))
    assert torch.equal(answer(torch.ones(1, 3), 2.0), torch.full((1, 3), 2.0))
    assert module.runs == 6


def test_values_that_come_out_of_a_form_are_not_remembered() -> None:
    class Table(nn.Module):
        value = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return torch.full((len(x),), self.value)

    module, form = Table(), FormTensor.of(torch.ones(2, 3))
    answer = FormMemory().answer(module)
    assert answer(form).tolist() == [1.0, 1.0]
    module.value = 2.0
    assert answer(form).tolist() == [2.0, 2.0]
