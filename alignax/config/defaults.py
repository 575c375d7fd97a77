"""All fields of a config, with their defaults and what they mean."""

from typing import Any

PATHS = (
    "workdir", "model.path", "model.critic", "lora.path", "reference.path", "reference.cache", "reward.path",
    "data.train", "data.eval", "data.pretrain", "data.ood",
)  # fmt: skip


def default_config() -> Any:
    """All fields there are, with their defaults; an experiment changes those that it is about."""
    from ml_collections import ConfigDict

    c = ConfigDict()
    c.seed = 0
    c.workdir = ""  # checkpoints, logs, samples, and the effective config
    c.steps = 0  # training steps; 0: as many as `epochs` take
    c.epochs = 1.0
    c.batch_size = 32  # examples (prompts) of a step, over all devices
    c.microbatches = 1  # parts of a batch, one forward and backward each
    c.max_skipped = 5  # so many non-finite steps in a row stop the run

    c.model = ConfigDict()
    c.model.path = ""  # Hugging Face folder: config, tokenizer, weights; or the mean of several's weights, A@0.5,B@0.5
    c.model.init = "pretrained"  # or "random": start without weights
    c.model.num_labels = 0  # 1: a reward model, which gives a score in place of logits; more: so many attributes; 0: as the folder is
    c.model.language_head = False  # a reward model keeps the output layer of the language model it starts from: log-probs beside scores
    c.model.critic = ""  # of PPO: "head" on the policy's trunk, or a folder, whose trunk is trained beside it; empty: none
    c.model.critic_heads = 1  # values that it gives of a token: of the KL first, then of each reward model; 1: of all together
    c.model.freeze = False  # train a reward model's head alone
    c.model.dtype = "auto"  # of activations: "auto" is bfloat16 on accelerators, float32 on CPU
    c.model.remat = "full"  # or "dots", "none"
    c.model.logps_chunk = 256  # positions whose logits exist at a time

    c.lora = ConfigDict()
    c.lora.rank = 0  # of low-rank adapters; 0: all parameters are trained
    c.lora.alpha = 16.0
    c.lora.targets = "all-linear"  # or names of matrices and shell patterns of them, "q_proj,v_proj" say
    c.lora.rslora = False  # scale alpha / sqrt(rank) rather than alpha / rank
    c.lora.dora = False
    c.lora.int8 = False  # hold the frozen base in int8
    c.lora.path = ""  # a PEFT folder to go on from, which then says all of the above

    c.ensemble = ConfigDict()
    c.ensemble.members = 0  # of an ensemble of reward models, member k as a run of its own with the seed `seed` + k; 0: one model
    c.ensemble.bootstrap = False  # each member has a sample of the pairs, drawn with replacement
    c.ensemble.own_noise = False  # each has label noise of its own; otherwise the same pairs are wrong for all

    c.reference = ConfigDict()
    c.reference.path = ""  # Hugging Face folder, or A@0.5,B@0.5; empty: the policy that the run starts from, of adapters their base
    c.reference.cache = ""  # folder for its log-probs of the data, computed once; empty: computed in every step
    c.reference.token_kl = False  # its KL from the policy in every token, over the whole vocabulary: TDPO, Quark and GKD read it
    c.reference.jsd_beta = 0.5  # of GKD's divergence: the reference's share of the mixture; 0: the forward KL, 1: the reverse
    c.reference.jsd_temperature = 1.0  # of GKD's divergence: what the logits of both are divided by

    c.reward = ConfigDict()
    c.reward.path = ""  # Hugging Face folders of reward models, commas between them: what experience calls `ensemble`

    # Further models by names of one's own, which experience(..) and loss(..) ask for: --config.models.weak.path=FOLDER, say. A folder as
    # of `reference.path`, or reward models as of `reward.path`; `adapters` is a PEFT folder that is put onto it.
    c.models = ConfigDict()

    c.rollout = ConfigDict()
    c.rollout.samples = 0  # completions of each prompt, which the policy samples as it is trained; 0: the data's completions
    c.rollout.max_new_tokens = 64
    c.rollout.temperature = 1.0  # of the policy and its reference, in samples and in all that scores them
    c.rollout.top_p = 1.0  # sample from the fewest tokens whose probabilities reach it; below 1 the loss must correct for it
    c.rollout.stop = ()  # strings that end a completion too, ('\n\n', 'User:') say
    c.rollout.minibatches = 1  # steps on a rollout, of batch_size prompts each
    c.rollout.epochs = 1  # times that a rollout is gone through
    c.rollout.ahead = False  # sample the next rollout before the steps on this one: rewards are waited for while the device trains
    c.rollout.slots = 0  # completions that are sampled side by side; 0: all, at most 64
    c.rollout.refill = 0  # times at most that groups whose rewards do not differ are replaced by those of further prompts (DAPO); 0: kept
    c.rollout.timeout = 600.0  # seconds for reward(..) on a rollout, and for gold(..)
    c.rollout.reward_workers = 1  # processes that these run in; each of several is given a share of the prompts
    c.rollout.reward_names = ()  # of several numbers that reward(..) gives a completion, ("correct", "format") say
    c.rollout.reward_weights = ()  # of these numbers in their sum; (): 1 each of a list, otherwise experience(..) makes one of them
    c.rollout.bad_rewards = "error"  # or "drop" (counted): where reward(..) raises, hangs, or gives no number

    c.data = ConfigDict()
    c.data.train = ""  # a file of rows, a folder of them, FOLDER:split, a pattern DIR/*.jsonl, hf://org/name:split, or A@0.7,B@0.3
    c.data.eval = ""  # the same, without weights
    c.data.pretrain = ""  # online, for the loss called "pretrain": rows of kind "sft", sources as of `train`
    c.data.ood = ""  # the same, from elsewhere: out of distribution, for `alignax eval-rm`
    c.data.kind = "preference"  # or "sft", "unpaired" (labelled completions, or pairs taken apart), "ranked" (k completions), "prompt"
    c.data.format = ""  # the name of a well-known set, "helpsteer3" say, whose rows are then read as its card describes them
    c.data.columns = ConfigDict()
    c.data.columns.prompt = "prompt"  # text or messages; where the file has no such column, the sides hold their prompt
    c.data.columns.chosen = "chosen"
    c.data.columns.rejected = "rejected"
    c.data.columns.completion = "completion"  # of "sft" and "unpaired"; "sft" of pairs takes the chosen side
    c.data.columns.messages = "messages"  # of "sft": a whole conversation
    c.data.columns.completions = "completions"  # of "ranked": a list, best first
    c.data.columns.label = "label"  # of "unpaired": true or false
    c.data.columns.margin = ""  # of "preference": a number, for losses that read the field `margin`; empty: none
    c.data.columns.attributes = ""  # of "sft": columns of numbers, or lists of numbers, "helpfulness,verbosity" say; empty: none
    c.data.columns.tools = "tools"  # of conversations: what the chat template is told of tools, where there is such a column
    c.data.template = ConfigDict()  # variables of the chat template: --config.data.template.enable_thinking=false, say
    c.data.columns.system = ""  # a text that becomes the system message of a conversation; texts beside it become its turns
    c.data.prompt_separator = ""  # for texts without a prompt column: the text that ends a prompt
    c.data.turns = "last"  # or "all": the assistant turns of a conversation that are scored
    c.data.max_length = 512  # tokens of prompt and completion
    c.data.max_prompt_length = 0  # keep the last so many prompt tokens; 0: all
    c.data.bad_rows = "error"  # or "drop" (counted)
    c.data.label_noise = 0.0  # share of the training pairs whose sides change places
    c.data.order = ""  # of training rows: shuffled; "file": as they stand; a column of numbers: the first epoch by it, "-column": downwards
    c.data.limit = 0  # the first so many rows of each source; 0: all

    c.optimizer = ConfigDict()
    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 5e-7
    c.optimizer.schedule = "cosine"  # or "linear", "constant"
    c.optimizer.warmup = 0.1  # share of the steps
    c.optimizer.final = 0.0  # share of the peak at the end
    c.optimizer.clip = 1.0  # global norm; 0: none
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.999
    c.optimizer.eps = 1e-8
    c.optimizer.weight_decay = 0.0

    c.mesh = ConfigDict({"member": 1, "data": 1, "fsdp": -1, "tensor": 1})

    c.eval = ConfigDict()
    c.eval.every = 0  # steps; 0: only before and after training
    c.eval.batch_size = 0  # examples; 0: as in training
    c.eval.samples = 4  # completions written to the log; 0: none
    c.eval.sample_prompts = 0  # prompts sampled for reward, gold reward and KL; 0: as many as `samples`
    c.eval.samples_per_prompt = 1  # completions of each of them; from 2 on with pass@k
    c.eval.pass_reward = 1.0  # a completion passes whose gold reward (where there is none, whose reward) is at least this, and is known
    c.eval.max_new_tokens = 64
    c.eval.temperature = 1.0  # 0: greedy
    c.eval.top_p = 1.0
    c.eval.stop = ()  # strings that end a completion too
    c.eval.params = "policy"  # or the name of an average

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 100  # steps; the last one is always saved
    c.checkpoint.keep = 2  # the newest so many
    c.checkpoint.best = ""  # also keep the one with the best evaluation metric, "loss" say (lowest) or "-rewards/margins" (highest)

    c.log = ConfigDict()
    c.log.every = 10  # steps between lines of a plain console
    c.log.tensorboard = True
    c.log.rollouts = 8  # responses of each rollout that rollouts.jsonl has as they were trained on; 0: none

    c.export = ConfigDict()
    c.export.final = True  # write WORKDIR/export, a Hugging Face folder, at the end
    c.export.dtype = "float32"
    c.export.params = "policy"  # or the name of an average
    for group in c.values():
        if isinstance(group, ConfigDict):
            group.lock()  # a misspelt field in an experiment file is an error; the top level takes its own fields, such as beta
    c.data.template.unlock()
    c.models.unlock()
    return c
