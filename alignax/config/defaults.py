"""All fields of a config: name, default and meaning."""

from typing import Any

PATHS = (
    "workdir", "model.path", "model.critic", "lora.path", "reference.path", "reference.cache", "reward.path",
    "data.train", "data.eval", "data.pretrain", "data.ood",
)  # fmt: skip


def default_config() -> Any:
    """A new config with every field at its default; an experiment changes the fields that it needs."""
    from ml_collections import ConfigDict

    c = ConfigDict()
    c.seed = 0  # of data order, sampling and new weights; 0 or more
    c.workdir = ""  # folder of the run: checkpoints, logs, samples, and the effective config
    c.steps = 0  # training steps; 0: as many as `epochs` take
    c.epochs = 1.0  # passes over the training data; read where `steps` is 0
    c.batch_size = 32  # examples (prompts) of a step, over all devices
    c.microbatches = 1  # parts of a batch, with one forward and backward pass each
    c.max_skipped = 5  # the run stops after this many non-finite steps in a row

    c.model = ConfigDict()
    c.model.path = ""  # Hugging Face folder of config, tokenizer and weights; A@0.5,B@0.5: the weighted mean of several folders' weights
    c.model.init = "pretrained"  # "pretrained": the folder's weights; "random": new weights
    c.model.num_labels = 0  # scores of a response; 1: a reward model, no logits; 2 or more: one score per attribute; 0: as the folder has
    c.model.language_head = False  # a reward model keeps its language model's output layer, and gives log-probs beside scores
    c.model.critic = ""  # PPO's critic: "head": on the policy's trunk; a model folder: a trunk of its own, also trained; empty: none
    c.model.critic_heads = 1  # values that the critic gives per token; 1: of the whole reward; more: of the KL, then of each reward model
    c.model.freeze = False  # train only the head of a reward model
    c.model.dtype = "auto"  # of activations: "float32" or "bfloat16"; "auto": bfloat16 on accelerators, float32 on CPU
    c.model.remat = "full"  # the backward pass recomputes each layer; or "attention", "dots", "none", "offload"; "auto": what fits
    c.model.attention = "auto"  # of padded rows: "splash" (TPU), "cudnn" (GPU), "xla"; "auto": the platform's own where it can, else xla
    c.model.packing = 0  # positions that a device computes at a time, packed with rows; 0: chosen where it pays; -1: rows are padded
    c.model.logps_chunk = 256  # positions whose logits are in memory at a time

    c.lora = ConfigDict()
    c.lora.rank = 0  # rank of low-rank adapters (LoRA); 0: no adapters, all parameters are trained
    c.lora.alpha = 16.0  # the adapters' product is scaled by alpha / rank
    c.lora.targets = "all-linear"  # matrices that get adapters: all, or names and shell patterns of them, as in "q_proj,v_proj"
    c.lora.rslora = False  # scale by alpha / sqrt(rank) instead of alpha / rank
    c.lora.dora = False  # train the magnitude of each output of an adapted matrix, too (DoRA)
    c.lora.int8 = False  # hold the frozen base in int8
    c.lora.path = ""  # PEFT folder of adapters to start from; it sets rank, alpha, targets, rslora and dora; `lora.rank` stays 0

    c.ensemble = ConfigDict()
    c.ensemble.members = 0  # reward models trained as one ensemble, member k with the seed `seed` + k; 0: a single model
    c.ensemble.bootstrap = False  # each member trains on its own sample of the pairs, drawn with replacement
    c.ensemble.own_noise = False  # each member has its own label noise; false: the same pairs are wrong for all

    c.reference = ConfigDict()
    c.reference.path = ""  # Hugging Face folder, or A@0.5,B@0.5; empty: the policy at the start of the run, of adapters their base
    c.reference.cache = ""  # folder for the reference's log-probs of the data, computed once; empty: chosen, see README; "off": none
    c.reference.token_kl = False  # KL of policy and reference at every token, over the whole vocabulary; TDPO, Quark and GKD need it
    c.reference.jsd_beta = 0.5  # GKD's divergence: share of the reference in the mixture, in [0, 1]; 0: forward KL; 1: reverse KL
    c.reference.jsd_temperature = 1.0  # GKD's divergence: divides the logits of policy and reference; above 0

    c.reward = ConfigDict()
    c.reward.path = ""  # Hugging Face folders of reward models, separated by commas: the `ensemble` of experience(..) and reward(..)

    # Further models, under names of your own, for experience(..), loss(..) and reward(..): --config.models.weak.path=FOLDER. The path is a
    # folder as in `reference.path`, or reward models as in `reward.path`; `adapters` is a PEFT folder that is merged into the model.
    c.models = ConfigDict()

    c.rollout = ConfigDict()
    c.rollout.samples = 0  # completions that the policy samples for each prompt (online training); 0: train on the data's completions
    c.rollout.max_new_tokens = 64  # longest sampled completion, in tokens
    c.rollout.temperature = 1.0  # divides the logits of policy and reference, in sampling and in scoring; above 0
    c.rollout.top_p = 1.0  # sample from the fewest tokens whose probabilities sum to top_p, in (0, 1]; below 1 the loss must correct for it
    c.rollout.stop = ()  # strings that also end a completion, as in ('\n\n', 'User:')
    c.rollout.minibatches = 1  # batches of batch_size prompts in a rollout; each is a training step
    c.rollout.epochs = 1  # passes over a rollout
    c.rollout.ahead = False  # sample the next rollout before the steps on the current one: the device trains while rewards are computed
    c.rollout.slots = 0  # completions sampled side by side; 0: all, as far as a device's free memory allows; on a CPU at most 64
    c.rollout.mesh = "auto"  # weights of sampling: "replicated" over batch shards, "tensor": shared, "train": gathered for each token
    c.rollout.int8 = False  # sample from a copy of the weights in int8: fewer bytes for each token; the loss must correct for the rounding
    c.rollout.refill = 0  # rounds, at most, that replace groups of equal rewards by groups of further prompts (DAPO); 0: they stay
    c.rollout.timeout = 600.0  # seconds for a call of reward(..) or gold(..) on a rollout; above 0
    c.rollout.reward_workers = 1  # processes that run reward(..) and gold(..); the prompts are divided among them
    c.rollout.reward_names = ()  # names of the numbers that reward(..) gives a completion, as in ("correct", "format"); (): one number
    c.rollout.reward_weights = ()  # their weights in a sum; (): 1 each for a list of functions, else experience(..) combines them
    c.rollout.bad_rewards = "error"  # when reward(..) raises, hangs or gives no number: "error": stop; "drop": leave out and count

    c.data = ConfigDict()
    c.data.train = ""  # training rows: a file, a folder, FOLDER:split, a pattern DIR/*.jsonl, hf://org/name:split, or a mixture A@0.7,B@0.3
    c.data.eval = ""  # evaluation rows, sources as of `train` but without weights
    c.data.pretrain = ""  # online training: rows of kind "sft" for the loss called "pretrain"; sources as of `train`
    c.data.ood = ""  # rows from another distribution, for `alignax eval-rm`; sources as of `eval`
    c.data.kind = "preference"  # or "sft", "unpaired" (labelled completions, or pairs taken apart), "ranked" (k completions), "prompt"
    c.data.format = ""  # name of a well-known data set, as in "helpsteer3": its rows are read as its card describes; empty: by `columns`
    c.data.columns = ConfigDict()
    c.data.columns.prompt = "prompt"  # text or messages; without this column, each response holds its prompt
    c.data.columns.chosen = "chosen"  # of "preference": the preferred response
    c.data.columns.rejected = "rejected"  # of "preference": the other response
    c.data.columns.completion = "completion"  # of "sft" and "unpaired"; for rows that are pairs, "sft" reads the chosen response
    c.data.columns.messages = "messages"  # of "sft": a whole conversation
    c.data.columns.completions = "completions"  # of "ranked": a list, best first
    c.data.columns.label = "label"  # of "unpaired": true (desirable) or false
    c.data.columns.margin = ""  # of "preference": column of numbers, which losses read as the field `margin`; empty: none
    c.data.columns.attributes = ""  # of "sft": columns of numbers or of lists of numbers, as in "helpfulness,verbosity"; empty: none
    c.data.columns.tools = "tools"  # of conversations: tools that the chat template is given, where the column exists
    c.data.template = ConfigDict()  # variables of the chat template, as in --config.data.template.enable_thinking=false
    c.data.columns.system = ""  # column of system messages, each a text; the row's other texts become the turns after it; empty: none
    c.data.prompt_separator = ""  # text that ends a prompt, for texts without a prompt column; empty: none
    c.data.turns = "last"  # assistant turns of a conversation that are scored: "last" or "all"
    c.data.max_length = 512  # longest row in tokens, prompt and completion together
    c.data.max_prompt_length = 0  # keep only the last so many tokens of a prompt; below `max_length`; 0: keep all
    c.data.bad_rows = "error"  # a row that cannot be used: "error": stop; "drop": leave out and count
    c.data.label_noise = 0.0  # share of the training pairs whose responses are swapped, in [0, 1)
    c.data.order = ""  # of training rows; empty: shuffled; "file": as in the file; COLUMN: first epoch sorted by it; -COLUMN: descending
    c.data.limit = 0  # rows read of each source, from its start; 0: all

    c.optimizer = ConfigDict()
    c.optimizer.name = "adamw"  # or "adam", "lion", "rmsprop", "sgd", "adafactor"
    c.optimizer.learning_rate = 5e-7  # at the peak of the schedule; above 0
    c.optimizer.schedule = "cosine"  # after the warm-up: "cosine" or "linear" decay, or "constant"
    c.optimizer.warmup = 0.1  # share of the steps in which the learning rate rises to its peak, in [0, 1)
    c.optimizer.final = 0.0  # last learning rate of a decay, as a share of the peak
    c.optimizer.clip = 1.0  # largest global norm of the gradient; 0: no clipping
    c.optimizer.b1 = 0.9  # decay of the gradient's mean, in [0, 1); of "sgd" the momentum
    c.optimizer.b2 = 0.999  # decay of the squared gradient's mean, in [0, 1)
    c.optimizer.eps = 1e-8  # added to the denominator of an update
    c.optimizer.moments = "float32"  # of what an optimizer remembers between steps; "bfloat16": half the memory; "int8": a quarter
    c.optimizer.gradient_dtype = "float32"  # in which gradients are summed over microbatches; or "bfloat16": half the memory
    c.optimizer.weight_decay = 0.0  # multiplied by the learning rate; norms, biases and offsets are exempt; 0: none

    # Devices along each axis: ensemble members, batch shards, batch and parameter shards, parts of long rows, parts of matrices. -1: all
    # devices that are left. slices: TPU slices, which follow one another along `data`; 0: as many as the devices report.
    c.mesh = ConfigDict({"member": 1, "data": 1, "fsdp": -1, "context": 1, "tensor": 1, "slices": 0})

    c.eval = ConfigDict()
    c.eval.every = 0  # steps between evaluations; 0: only before and after training
    c.eval.batch_size = 0  # examples of an evaluation batch; 0: `batch_size`
    c.eval.samples = 4  # completions written to the log; 0: none
    c.eval.sample_prompts = 0  # prompts whose completions are sampled for reward, gold reward and KL; never fewer than `samples`
    c.eval.samples_per_prompt = 1  # completions sampled for each of these prompts; 2 or more also give pass@k
    c.eval.pass_reward = 1.0  # a completion passes if its gold reward (its reward, where there is no gold) is known and at least this
    c.eval.max_new_tokens = 64  # longest sampled completion, in tokens
    c.eval.temperature = 1.0  # divides the logits in sampling; 0: greedy
    c.eval.top_p = 1.0  # sample from the fewest tokens whose probabilities sum to top_p, in (0, 1]; 1: all tokens
    c.eval.stop = ()  # strings that also end a completion, as in ('\n\n', 'User:')
    c.eval.params = "policy"  # parameters that are evaluated: "policy", or the name of an average of averages(..)

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 100  # steps between checkpoints; the last step is always saved
    c.checkpoint.keep = 2  # newest checkpoints that are kept
    c.checkpoint.best = ""  # also keep the checkpoint best by a metric, as in "loss" (lowest) or "-rewards/margins" (highest); empty: none

    c.log = ConfigDict()
    c.log.every = 10  # steps between console lines; a terminal has a progress line instead
    c.log.tensorboard = True  # also write WORKDIR/tensorboard
    c.log.profile = 0  # steps after the first, which compiles, whose trace is written to WORKDIR/profile, in whole rollouts; 0: none
    c.log.rollouts = 8  # responses of each rollout written to rollouts.jsonl, as they were trained on; 0: none

    c.export = ConfigDict()
    c.export.final = True  # write WORKDIR/export, a Hugging Face folder, at the end of training
    c.export.dtype = "float32"  # of the exported weights; or "float16", "bfloat16"
    c.export.params = "policy"  # parameters that are exported: "policy", or the name of an average of averages(..)
    for group in c.values():
        if isinstance(group, ConfigDict):
            group.lock()  # a misspelt field is an error; the top level takes an experiment's own fields, such as beta
    c.data.template.unlock()
    c.models.unlock()
    return c
