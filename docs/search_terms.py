"""Words by which the site's search and index find a section, by page and heading.

The search ranks a section first for its words with an exclamation mark.
"""

SEARCH_TERMS = {
    "design/equations": {
        "Source": "citation, cite, paper",
    },
    "guides/checkpoints": {
        "Checkpoints": "!checkpoint, !resume, !save model, load model, state dict",
    },
    "guides/choosing": {
        "Width": "!learnable decay, !learnable threshold, PLIF, granularity, learning rate, weight decay",
        "Surrogate": "!surrogate gradient",
        "Integer spikes": "quantization, I-LIF, integer spikes",
    },
    "guides/compile": {
        "ONNX and torch.jit": "!ONNX, torch.onnx, TorchScript, torch.jit",
    },
    "guides/convolutional": {
        "Convolutional networks": "!convolution, Conv2d, CNN, pooling",
        "Residual blocks": "!residual, shortcut, skip connection, !ResNet",
    },
    "guides/distributed": {
        "Several GPUs": "!DDP, !multiple GPUs, multi-GPU, DistributedDataParallel, SyncBatchNorm, torchrun, FSDP",
    },
    "guides/encoding": {
        "Encoding and event datasets": (
            "!encoding, encoder, !dataset, !Poisson, !latency, rate coding, constant current"
        ),
        "Frames of events, with tonic": (
            "!events, event camera, DVS, tonic, neuromorphic dataset, N-MNIST, DVS Gesture, SHD"
        ),
        "Data loading that keeps the cores busy": (
            "!data loading, DataLoader, num_workers, workers, cores, slow training"
        ),
    },
    "guides/energy": {
        "Energy: counting synaptic operations": "!energy, !synaptic operations, SynOps, SOP, FLOPs, power, accumulates",
    },
    "guides/evaluation": {
        "Evaluation: attacks, ensembles, chips": "evaluation, inference, adversarial attack",
        "Ensembles": "!ensemble, vmap, torch.func, ensembles",
        "On chips": "!chip, neuromorphic hardware, Loihi, Speck, deployment",
    },
    "guides/memory": {
        "Memory": "!out of memory, OOM, CUDA out of memory",
    },
    "guides/mixed-precision": {
        "Mixed precision": "!bfloat16, !float16, !AMP, autocast, half precision, GradScaler",
    },
    "guides/padding": {
        "Variable length, padding, batch first": (
            "!variable length, !padding, !mask, pad_sequence, lengths, last valid step, ragged sequences"
        ),
        "Batch first": "!batch first, time_dim, time dimension",
    },
    "guides/rates": {
        "Firing rates: measuring, regularising, logging": (
            "!firing rate, !firing rate regularization, spike rate, sparsity, penalty on spikes"
        ),
        "TensorBoard and other loggers": "!TensorBoard, SummaryWriter, logging, wandb",
    },
    "guides/recurrent": {
        "Recurrent neurons": (
            "!recurrent, recurrence, RNN, !RSNN, !RLIF, !RadLIF, !LSNN, recurrent connections, feedback, "
            "!RLeaky, RSynaptic, !LIFRecurrent, LinearRecurrentContainer"
        ),
        "Spoken digits: SHD": "!SHD, SSC, Heidelberg digits, spoken digits, Speech Commands",
    },
    "guides/spike-layers": {
        "Layers that only spikes cost": "!SpikeLinear, !SpikeConv2d, sparse spikes, sparse product, to_spike_layers",
    },
    "guides/states": {
        "Reset and detach": "!reset state, hidden state",
        "Membrane potentials": "!membrane potential, voltage, recording, potentials, v_seq, store_v_seq",
        "Time constants: decay and tau": "!tau, time constant, decay, beta, alpha, leak, dt",
    },
    "guides/troubleshooting": {
        "`its potentials are NaN, and no weight of the model is`": "!NaN, inf, loss is nan",
        "Speed and installation": "!slow, speed",
        "Between two runs": "!reproducible, reproducibility, deterministic",
    },
    "guides/widths": {
        "Freezing and sharing widths": "!freeze width, !share width, fixed width, tied parameters",
    },
    "reference/neurons": {
        "Neurons as layers": "!LIF",
    },
    "start/install": {
        "Install": "install, !GPU, CUDA, cupy, nvcc, !Windows, macOS, wheel",
    },
    "start/looking-at-spikes": {
        "Looking at spikes": "!raster plot, !plot spikes",
    },
    "tutorials/speech": {
        "Speech": "!readout, read-out, synaptic current, speech",
    },
    "tutorials/stalled-network": {
        "A network that does not learn": "!silent, !dead neurons, chance level, does not learn, loss not decreasing",
    },
    "tutorials/streaming": {
        "Streaming": "!streaming, online inference, real time",
    },
}
