"""Take a tiny random model of each architecture through all stages, and print what works as a table.

`python benchmarks/architectures.py` takes the model types of the docs' table, those that are named, or `all` that transformers'
`AutoModelForCausalLM` knows through SFT, reward model and PPO, with adapters and with full weights, saves, merges, exports and
resumes. `--results FILE` keeps outcomes, so that an interrupted run goes on; `--write docs/models.md` puts the table there.

Models have two or so layers of width 32 and random weights, so nothing is downloaded. An architecture *works* if all stages
end, their preflights pass (the sampler's log-probabilities are the trainer's, saved adapters load, merging changes nothing)
and the exported policy and reward model, opened by plain transformers, compute what the registry's do. It is *refused* if a
stage ends before its training with a line that says why.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

#: Marks between which a page holds the table.
MARKS = ("<!-- architectures: made by benchmarks/architectures.py -->", "<!-- end of architectures -->")
TOKENS = 320
#: Small sizes by the names that configs give them; what a config does not have is left out.
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 256, "vocab_size": TOKENS, "pad_token_id": 1, "bos_token_id": 0,
    "eos_token_id": 0, "initializer_range": 0.1,
    # Experts.
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_k": 2, "moe_topk": 2, "moe_top_k": 2, "moe_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "num_nextn_predict_layers": 0, "expert_ffn_hidden_size": 32, "ffn_hidden_size": 64,
    "intermediate_size_mlp": 64, "moe_layer_start_index": 0,
    # Latent attention.
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "o_lora_rank": 8,
    "index_n_heads": 2, "index_head_dim": 16, "index_topk": 64,
    # States.
    "state_size": 8, "mamba_d_state": 8, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1,
    "mamba_expand": 2, "n_mamba_heads": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "time_step_rank": 4, "mamba_dt_rank": 4, "mamba_head_dim": 8, "mamba_num_heads": 8,
    "ssm_state_size": 8,
    "n_groups": 1,
    # Encoders, and other old names.
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "d_model": 32, "ffn_dim": 64, "word_embed_proj_dim": 32, "embedding_size": 32, "n_positions": 256,
    "d_kv": 8, "d_ff": 64, "num_layers": 2, "n_layer": 2, "n_head": 4, "n_embd": 32, "n_layers": 2, "n_heads": 4, "num_heads": 4,
    "rotary_dim": 8, "max_seq_len": 256, "sliding_window": 64,
}  # fmt: skip
#: Rows of the docs' table: one of each kind, and the most used families.
TABLE = [
    "opt", "bart", "mixtral", "olmoe", "qwen3_moe", "granite", "cohere", "lfm2", "rwkv", "llama4_text", "doge", "bert",
    "bert (is_decoder)", "roberta", "roberta (is_decoder)", "gpt_oss", "gemma2", "bloom", "roformer", "mamba", "falcon_h1",
    "llama", "qwen2", "qwen3", "mistral", "gpt2", "gpt_neox", "phi3", "gemma", "gemma3_text", "olmo2", "falcon", "phi",
    "electra", "xlm-roberta", "camembert", "marian", "pegasus", "git", "trocr", "starcoder2", "stablelm", "smollm3",
    "deepseek_v3", "qwen3_next", "mamba2", "jamba", "mpt", "gpt_neo", "gptj", "cohere2", "glm4", "gemma3", "llama4",
    "deepseek_v4", "afmoe", "granitemoehybrid", "gemma4_unified",
]  # fmt: skip
#: Options that a model type needs besides.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "granite": {"logits_scaling": 8.0},
    "cpmant": {"dim_head": 8, "dim_ff": 64, "position_bias_num_buckets": 32},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {
        "num_experts_per_tok": 2,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
    },
    "gemma3": {
        "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    },
    "gemma4_text": {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": TOKENS, "num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "moe_topk": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [16, 16],
    },
    "rwkv": {"rescale_every": 1},
    "roc_bert": {"enable_pronunciation": False, "enable_shape": False},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
#: Options of each stage: a few steps on a few rows.
COMMON: dict[str, Any] = {
    "name": "tiny", "device": "cpu", "dtype": "float32", "wandb_mode": "disabled", "lora_r": 4, "lora_alpha": 8,
    "learning_rate": 1e-3, "optim": "adamw_torch",
}  # fmt: skip
STEPS: dict[str, Any] = {
    "max_steps": 2, "eval_steps": 1, "save_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
}  # fmt: skip
STAGES: dict[str, dict[str, Any]] = {
    "sft": {**STEPS, "chat_template": "plain"},
    "reward": {
        **STEPS, "policy": "sft/tiny", "response_length": 4, "card_policy_samples": 2, "card_likelihood_responses": 4,
        "card_probe_answers": 1,
    },
    "ppo": {
        "policy": "sft/tiny", "total_episodes": 8, "rollout_batch_size": 4, "minibatch_size": 4, "microbatch_size": 2,
        "response_length": 6, "num_eval_samples": 2, "save_steps": 1,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What became of an architecture."""

    architecture: str
    state: str
    """`works`, `refused`, `fails`, or `not tried`: no small model of it could be made."""
    note: str
    seconds: float


def main() -> None:
    """Print the table, and write it into a page if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "architectures", nargs="*", help="model types; `all`, or those of the docs' table if none is named"
    )
    parser.add_argument("--results", type=Path, help="file of outcomes: those in it are not measured again")
    parser.add_argument("--write", type=Path, help="page with the marks between which the table is put")
    parser.add_argument("--traceback", action="store_true", help="print tracebacks of what fails")
    arguments = parser.parse_args()
    names, outcomes = arguments.architectures or TABLE, read_results(arguments.results)
    for name in known_architectures() if names == ["all"] else names:
        if name in outcomes:
            continue
        outcome = outcomes[name] = examine(name, show=arguments.traceback)
        if arguments.results:
            with arguments.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
        print(
            f"{outcome.architecture}: {outcome.state} ({outcome.seconds:.0f} s) {outcome.note}",
            file=sys.stderr,
            flush=True,
        )
    table = as_table(sorted(outcomes.values(), key=lambda outcome: outcome.architecture))
    print(table)
    if arguments.write:
        page, (begin, end) = arguments.write.read_text(encoding="utf-8"), MARKS
        head, _, rest = page.partition(begin)
        arguments.write.write_text(f"{head}{begin}\n{table}\n{end}{rest.partition(end)[2]}", encoding="utf-8")
    sys.exit(any(outcome.state == "fails" for outcome in outcomes.values()))


def read_results(file: Path | None) -> dict[str, Outcome]:
    """Return the outcomes that an earlier run wrote, by architecture."""
    lines = file.read_text(encoding="utf-8").splitlines() if file and file.is_file() else []
    return {outcome.architecture: outcome for outcome in (Outcome(**json.loads(line)) for line in lines)}


def known_architectures() -> list[str]:
    """Return the model types that `AutoModelForCausalLM` knows, some with an option that is off by default."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "bert (is_decoder)", "roberta (is_decoder)"])


def as_table(outcomes: Iterable[Outcome]) -> str:
    """Return outcomes as a Markdown table."""
    rows = [f"| {o.architecture} | {o.state} | {o.note} |" for o in outcomes]
    covered = f"{len(rows)} of {len(known_architectures())} rows that the script knows."
    return "\n".join([covered, "", "| architecture | | |", "|---|---|---|", *rows])


def tiny_config(architecture: str) -> Any:
    """Return a config at small sizes of a model type, or of one with options that are to be true: `TYPE (OPTION)`."""
    from transformers import CONFIG_MAPPING

    name, _, options = architecture.removesuffix(")").partition(" (")
    exceptions = {**EXCEPTIONS.get(name, {}), **dict.fromkeys(options.split(", ") if options else [], True)}
    return CONFIG_MAPPING[name](**_small(CONFIG_MAPPING[name], exceptions))


def _small(kind: Any, exceptions: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of a config class: small sizes where it has such a field, in its parts as well, and a layer of each type."""
    default, aliases = kind(), {own: common for common, own in getattr(kind, "attribute_map", {}).items()}
    options: dict[str, Any] = {}
    for name, value in vars(default).items():
        small = SIZES.get(name, SIZES.get(aliases.get(name, "")))
        if (small is not None and type(value) in (int, float)) or name in (
            "pad_token_id",
            "bos_token_id",
            "eos_token_id",
        ):
            options[name] = small
    if "qk_rope_head_dim" in options:  # latent attention: keys have as many heads as queries
        options["num_key_value_heads"] = SIZES["num_attention_heads"]
    for field in ("layer_types", "mlp_layer_types", "layers_block_type"):
        if kinds := list(dict.fromkeys(vars(default).get(field) or [])):
            options[field] = (kinds * 2)[: max(2, len(kinds))]
            options["num_hidden_layers"] = max(options.get("num_hidden_layers", 2), len(options[field]))
    for field in ("layer_types", "mlp_layer_types"):
        if field in options:
            options[field] = (options[field] * 4)[: options["num_hidden_layers"]]
    for name, part in getattr(kind, "sub_configs", {}).items():
        if hasattr(part, "model_type") and isinstance(getattr(default, name, None), part):
            options[name] = _small(part, exceptions.get(name, {}))
    return {**options, **exceptions}


def make_model(architecture: str, folder: Path) -> None:
    """Write a tiny random model and a tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    config = tiny_config(architecture)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if not bool(parameter.any()):  # as in no trained model; zeros hide what they multiply
            torch.nn.init.normal_(parameter, std=0.1)
    count = sum(p.numel() for p in model.parameters())
    assert count < 5e6, f"{count:,} parameters are not tiny"
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def tokenizer() -> Any:
    """Return a byte-level tokenizer of a few tokens more than bytes."""
    from rlhf.models.vocabulary import train_tokenizer

    return train_tokenizer([" ".join(_answer(i) for i in range(8))] * 4, 280, chat_template="plain")


def _answer(i: int) -> str:
    return f"a {('good', 'bad', 'great', 'awful')[i % 4]} {('film', 'plot')[i // 4 % 2]}"


def write_data(folder: Path) -> None:
    """Write demonstrations, comparisons and prompts."""

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        file = folder / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    for split, count in (("train", 8), ("validation", 4)):
        prompts = [[{"role": "user", "content": f"{split[0]}{i}" * (1 + i % 3)}] for i in range(count)]
        answers = [[{"role": "assistant", "content": _answer(i)}] for i in range(count)]
        write(
            f"demonstrations/{split}", [{"prompt": p, "completion": a} for p, a in zip(prompts, answers, strict=True)]
        )
        pairs = [[answers[i], [{"role": "assistant", "content": _answer(i + 1)}]] for i in range(count)]
        write(
            f"comparisons/{split}",
            [{"prompt": p, "responses": r, "ratings": [1.0, 0.0]} for p, r in zip(prompts, pairs, strict=True)],
        )
        write(f"prompts/{split}", [{"prompt": p} for p in prompts])


def examine(architecture: str, *, show: bool = False) -> Outcome:
    """Take an architecture through the stages and return what became of it."""
    from rlhf.base.errors import UserError

    started, state, note, step = time.perf_counter(), "works", "", "not tried"
    with tempfile.TemporaryDirectory(prefix="architecture-") as name:
        folder = Path(name)
        write_data(folder / "data")
        steps = chain(folder, architecture)
        try:
            while step:
                with _quiet():
                    step = next(steps, "")
        except UserError as error:
            state, note = "refused", f"{step}: " + str(error).replace(name, "FOLDER")
        except Exception as error:
            if show:
                traceback.print_exc()
            last = (str(error).strip().splitlines() or [""])[-1]
            state, note = (
                ("fails", f"{step}: {type(error).__name__}: {last}") if step != "model" else ("not tried", last)
            )
    return Outcome(architecture, state, note, time.perf_counter() - started)


def chain(folder: Path, architecture: str) -> Iterator[str]:
    """Run the stages one after the other, naming each before it starts."""
    yield "model"
    make_model(architecture, folder / "base")
    yield "sft"
    run_stage("sft", folder, model_name_or_path=str(folder / "base"))
    yield "sft resumed"
    resume_equals("sft", folder, "tiny", model_name_or_path=str(folder / "base"))
    yield "reward"
    run_stage("reward", folder)
    yield "ppo"
    run_stage("ppo", folder, reward=["reward/tiny"])
    yield "ppo resumed"
    resume_equals("ppo", folder, "tiny", reward=["reward/tiny"])
    yield "export"
    check_exports(folder, "tiny")
    yield "reward full"
    run_stage("reward", folder, name="full", finetuning="full")
    yield "ppo full"
    run_stage("ppo", folder, name="full", finetuning="full", reward=["reward/full"])
    yield "export full"
    check_exports(folder, "full")


def run_stage(stage: str, folder: Path, **options: Any) -> Any:
    """Run a stage in this process; return its artefact."""
    import importlib

    from rlhf import config as configs

    runner = importlib.import_module(f"rlhf.stages.{stage}")
    kind = {"sft": configs.SFTConfig, "reward": configs.RewardConfig, "ppo": configs.PPOConfig}[stage]
    own = {"dataset": str(folder / "data"), "registry": str(folder / "registry"), "output_dir": str(folder / "out")}
    return runner.run(kind(**{**COMMON, **STAGES[stage], **own, **options}))


def resume_equals(stage: str, folder: Path, name: str, **options: Any) -> None:
    """Resume a finished run from its last checkpoint but one; the result has to be equal."""
    import shutil

    from rlhf.registry import Registry

    registry = Registry(folder / "registry")
    whole = registry.get(f"{stage}/{name}")
    last = max(
        (folder / "out" / stage / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[-1])
    )
    shutil.rmtree(last)
    scratch = folder / "resumed"
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(folder / "registry", scratch)
    resumed = run_stage(stage, folder, **options, registry=str(scratch), resume=True)
    for file in whole.path.glob("*.safetensors"):
        assert file.read_bytes() == (resumed.path / file.name).read_bytes(), f"{file.name} differs in the resumed run"


def check_exports(folder: Path, name: str) -> None:
    """Export policy and reward model; plain transformers has to compute what the registry's models do."""
    import torch
    from transformers import AutoModelForCausalLM

    from rlhf.models.classifiers import open_classifier
    from rlhf.models.registered import merged_model
    from rlhf.registry import Registry
    from rlhf.sharing.export import export

    registry = Registry(folder / "registry")
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
    for stage, open_model in (("ppo", AutoModelForCausalLM.from_pretrained), ("reward", open_classifier)):
        artifact = registry.get(f"{stage}/{name}")
        with torch.no_grad():
            expected: Any = merged_model(registry, artifact)
            expected = expected.eval()(input_ids=ids, use_cache=False).logits
            target = export(registry, artifact, folder / f"exported-{stage}-{name}")
            opened = open_model(target).eval()(input_ids=ids, use_cache=False).logits
        difference = float((opened - expected).abs().max())
        assert difference < 1e-4, f"the exported {stage} model differs by {difference:.2g}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back warnings and what the stages print."""
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    silence = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        warnings.simplefilter("ignore")
        yield


if __name__ == "__main__":
    main()
