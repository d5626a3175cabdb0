"""Mistakes for test_mutants.py to seed in kernels and launchers, by the program that finds them."""

from functools import partial
from typing import NamedTuple


class Mutant(NamedTuple):
    """A mistake in a file of csrc: in a context that has @ for it, old is replaced by new.

    Both are expressions, or statements with their semicolons, of which one may be empty.
    """

    file: str
    context: str
    old: str
    new: str


kernels = partial(Mutant, "cuda/neuron_kernels.cuh")
sums = partial(Mutant, "cuda/gradient_sum.cuh")
access = partial(Mutant, "cuda/access.cuh")
noise = partial(Mutant, "cuda/noise.cuh")
plans = partial(Mutant, "cuda/plan_neurons.cuh")
launchers = partial(Mutant, "cuda/launch_neuron.cuh")
channel_launchers = partial(Mutant, "cuda/launch_normalisation.cuh")
params = partial(Mutant, "params/neuron.h")
neuron = partial(Mutant, "math/neuron.h")
thread_neuron = partial(Mutant, "cuda/thread_neuron.cuh")
divisor = partial(Mutant, "math/divisor.h")
rules = partial(Mutant, "math/lif_by_options.h")
integrator = partial(Mutant, "cuda/integrator_kernels.cuh")
integrator_launchers = partial(Mutant, "cuda/launch_integrator.cu")
channels = partial(Mutant, "cuda/normalisation_kernels.cuh")
channel_params = partial(Mutant, "params/normalisation.h")

BARRIER = "__syncthreads();"
SHUFFLE = "__shfl_down_sync(kWholeWarp, sum, distance)"
NO_BARRIER = kernels("  }\n  @\n  constexpr int kWarps", BARRIER, "")
ALL_LIVE = access("live(@)", "n < shape.neurons()", "true")
NO_BARRIER_OF_CHANNELS = channels("half * tiles.width]);\n    @", BARRIER, "")
BEYOND_LAST_ROW = channels("if (@) {\n        const Scalar* gradients", "row + k * index.step < index.end_row", "true")

MUTANTS = {
    "kernels_test": {
        # ---- forward ----
        "all live": ALL_LIVE,
        "no tail check of spikes": kernels("if (@) Lanes::store(s,", "index.live", "true"),
        "no tail check of checkpoints": kernels("&& @) {\n      store(state, (done", "index.live", "true"),
        "no tail check of the last state": kernels("exists(params.last) && @)", "index.live", "true"),
        "no last checkpoint": kernels("== 0 && @ &&", "done < steps", "done + kSteps < steps"),
        "the last x is not loaded": kernels("load_step(@, k + kSteps)", "steps - start", "steps - start - 1"),
        "the first x of a shorter sequence": kernels("load_step(@, k);", "steps", "steps - 1"),
        "x in the place of another": kernels("if (k < left) x[@].load", "k % kSteps", "(k + 1) % kSteps"),
        "wrong outer index": access("element(@ ? read_n", "shape.outer == 1", "shape.steps == 1 || shape.outer > 0"),
        "wrong checkpoint read": access("load(checkpoints, (@)", "start / kCheckpointSteps - 1", "0"),
        # ---- residual ----
        "no residual gain in forward": kernels("c = c + @ * r_k[j]", "params.residual_gain", "Real(1)"),
        "the residual of the first step": kernels("load(params.residual + @);\n    advance(load", "load_element",
                                                  "index.element"),
        "the residual in the place of another": kernels("r[@].load(params.residual", "k % kSteps", "(k + 1) % kSteps"),
        "no residual gain in backward": kernels("c = c + @ * r[j];\n      h[j]", "residual_gain", "Real(1)"),
        "no residual gain in general backward": kernels("c = c + @ * r[j];\n        h.values", "params.residual_gain",
                                                        "Real(1)"),
        "the residual of the segment's first step": kernels("load(params.residual + (@), r)",
                                                            "first_element + k * stride", "first_element"),
        "the residual of the first segment": kernels("residual = params.residual + @;", "element", "index.element"),
        "no tail check of the residual's gradient": kernels("params.grad_residual != nullptr && @) {\n        int64",
                                                            "index.live", "true"),
        "the gradient of x as the residual's": kernels("store(@, params.grad_residual + stored_element)", "dc",
                                                       "dx"),
        "the gradient of x as the settled residual's": kernels("store(@, params.grad_residual + stored);", "dh", "dx"),
        "settled kernel for a general residual": plans("return @ ? Input::kGeneralResidual", "input == Input::kGeneral",
                                                       "false"),
        "four neurons for any residual": launchers("groups_of_four(params, @, params.s_seq", "params.residual",
                                                   "params.x_seq"),
        # ---- noise ----
        "wrong lanes exchange noise": noise("exchanged = @", "__shfl_sync(kWholeWarp, drawn, other, kNoiseGroup)",
                                            "__shfl_sync(kWholeWarp, drawn, other)"),
        "wrong neuron's noise": noise(">> (2 * @)", "rank", "other"),
        "noise of eight steps less": noise("@);", "length - 8", "length - 9"),
        "noise of later steps too early": noise("later.bits_ >>= @;", "first", "0"),
        "noise of other few steps": noise("(4 * (@))};", "first % 8", "first % 4"),
        "noise of the first eight steps": noise("few = {(@ ? steps", "first < 8", "true"),
        "noise of another step of few": noise("bits >> (@ + j)", "4 * k", "4 * (k ^ 1)"),
        "wrong step's noise": noise("eight_steps(source, n, @,", "start + 8", "start"),
        "noise of too few steps": noise("pair < 4 && @;", "2 * pair < length", "2 * pair + 1 < length"),
        "noise of the first pair": noise("start / 2 + @);\n      uint32", "pair", "0"),
        "noise of the first of two pairs": noise("noise_block(group, first + @, key_)", "1", "0"),
        "noise of two steps swapped": noise("two_.blocks[k / 2], @", "k % 2", "1 - k % 2"),
        "always where never": noise("!drawn_ && @;", "limit_ > 0", "true"),
        "noise of a shorter segment": kernels("noise(source, index.n, start, @);\n      State", "length", "length - 2"),
        "noise of a shorter segment in the general backward": kernels(
            "start, @);\n    const auto fire_lane = [&](Real h", "length", "length - 2"
        ),
        "not always where the state says so": params("below >= kAlwaysAnalog ? @ :", "kAlwaysAnalog",
                                                     "kAlwaysAnalog - 1"),
        "sometimes where the state says never": params("below <= 0 ? @ :", "0", "1"),
        # ---- the firing rule ----
        "no spike at a subnormal distance": neuron("Real(@) : Real(0x1p-1074)", "0x1p-149f", "0x1p-126f"),
        "a spike at the threshold": neuron("least_u(@ ?", "options.strict_threshold", "false"),
        # ---- the settled backward ----
        "no tail check in the settled backward": kernels("else if (@) {\n              Access<kLanes>::store(dx,",
                                                         "index.live", "true"),
        "no tail check of the first state": kernels("\n    if (exists(params.grad_init) && @)", "index.live", "true"),
        "the last first x is not loaded": kernels("load_x(@, k);\n#pragma", "k < length", "k + 1 < length"),
        "the last later x is not loaded": kernels("load_x(@, k);\n        }", "k + kSteps < left",
                                                  "k + kSteps + 1 < left"),
        "the last gradient is not loaded": kernels("load_gradient(@, k);\n    };", "k < length - last",
                                                   "k + 1 < length - last"),
        "earlier gradients are not loaded": kernels("load_gradient(@, k);\n        }", "first > 0", "first > kSteps"),
        "wrong element of later steps": kernels("(x_seq, @)", "stride", "stride - 1"),
        "wrong element of earlier steps": kernels("(grad_s_seq, @)", "-stride", "1 - stride"),
        "wrong first element of the gradients": kernels("(last + @) * stride;", "kSteps - 1",
                                                        "kSteps - 1 + (last > 0)"),
        "wrong element of dx": kernels("(grad_x_seq, @)", "-stride", "1 - stride"),
        "potentials of another step": kernels("h[k] = potentials[@]", "first + k", "first + (k ^ 1)"),
        "potentials kept for another step": kernels("potentials[@][threadIdx.x] = h", "first + k", "first + (k ^ 2)"),
        "carried too early in the settled backward": kernels("has_grad_last ? left : @,", "followed", "left"),
        "carried too late in the settled backward": kernels("followed = left - @;", "last_steps", "1"),
        "what is given does not carry": kernels("carried_steps = @ ?", "has_grad_last", "false"),
        "through the reset though nothing is carried": kernels("if (@ && !options.detach_reset)", "carried", "true"),
        "through the reset though it is detached": kernels(") && @) {", "!options.detach_reset", "true"),
        "width's gradient without a threshold": kernels("(h[j] - @);", "neuron.v_threshold", "Real(0)"),
        "gain's gradient of another step": kernels("(kInRegisters ? x : x_again)[@].unpack", "k", "k ^ 1"),
        "x once more of another step": kernels("(x_seq_again, @)", "-stride", "1 - stride"),
        "x once more of the first steps": kernels("x_seq_again = params.x_seq + @;", "last_element", "element"),
        "gain's gradient without a mean": kernels("(x[j] - @)", "neuron.input_mean", "Real(0)"),
        "dx without the gain": kernels("kNormalised ? @ :", "neuron.input_gain * step.dc", "step.dc"),
        "decay's gradient is not learned": kernels("decay_steps = @ ?", "has(wanted, kDecay)", "false"),
        "threshold's gradient is not learned": kernels("(wanted & (@ |", "1u << kThreshold", "0u"),
        "reset's gradient is not learned": kernels("| @)) != 0", "1u << kReset", "0u"),
        "decay's gradient beyond the last step": kernels("? @ : 0;", "followed", "left"),
        "decay's gradient without the first step": kernels("sums[kDecay] += @ * init", "dh[j]", "Real(0)"),
        "decay's gradient of another first state": kernels("params.checkpoints, @, index, init)", "0",
                                                           "(steps > kCheckpointSteps ? kCheckpointSteps : 0)"),
        "decay's gradient of another potential": kernels("add_decay(dh, h[@].values", "k", "k > 0 ? k - 1 : k"),
        "decay's gradient of another spike": kernels("s[@], neuron, after)", "j", "0"),
        "threshold's gradient without a width": kernels("from_u[j] = step.dy * @;", "neuron.inverse_width", "Real(1)"),
        "reset's gradient only of what is given": kernels(
            "if (@) sums[kReset] += Model::gradient_of_reset(d_after", "k < carried_steps", "has_grad_last"
        ),
        "reset's gradient of the step before": kernels("gradient_of_reset(@, s[j])", "d_after.v[j]", "d_state.v[j]"),
        "reset's gradient of another spike": kernels("d_after.v[j])), s[@])", "j", "0"),
        "gain's and bias' sums swapped": kernels("params.shape, thread_sums[@]);\n  }", "id",
                                                 "id < kInputGain ? id : kInputGain + kInputBias - id"),
        "sums of one parameter a warp": kernels("left != 0; @, id +=", "left >>= kWarps", "left >>= 2 * kWarps"),
        "no barrier before sums": kernels("if (!kInRegisters) @", BARRIER, ""),
        "no barrier between sums of threads": NO_BARRIER,
        # ---- the general backward ----
        "no tail check of dx": kernels("params.grad_x_seq != nullptr && @)", "index.live", "true"),
        "no tail check of the first state in the general backward": kernels(
            "\n  if (exists(params.grad_init) && @)", "index.live", "true"
        ),
        "wrong element of the gradient": kernels("(first_element + @ * stride), next_g", "k", "(k > 0)"),
        "carried too early": kernels("\n  if (carried) load(params.grad_last, index.read_n, d_state);@", "",
                                     "carried = true;"),
        "carried too late": kernels("\n      @\n", "carried = true;", ""),
        "v_seq does not carry": kernels("\n        @\n", "carried = true;", ""),
        "parameters of the wrong step": kernels("@", "neuron.move_to(t - 1);", ""),
        "parameters of the step before": kernels("@", "neuron.move_to(t);", ""),
        "gain's gradient without x": kernels("if (@) Lanes::load(params.x_seq + element, x", "has(wanted, kInputGain)",
                                             "false"),
        "threshold's gradient without scaled spikes": kernels("@", "sums[kThreshold] += g[j] * s;", ""),
        "through the reset though it is detached, in general": kernels("carried && @, neuron", "!options.detach_reset",
                                                                       "true"),
        "decay's gradient without v_rest": kernels("before.v[j] - @)", "options.v_rest", "Real(0)"),
        "sums in the row of the first step": kernels("data + @ * params.partials", "t", "int64{0}"),
        "a step's sum stays": kernels("@", "sums[id] = Real(0);", ""),
        "sums in a row that is still needed": kernels("sums[id], @);\n          ", "k", "k > 0 ? k - 1 : k"),
        "no barrier between segments": kernels("      }\n    }\n    @", BARRIER, ""),
        "no barrier between two sums": kernels("(potentials[row]);\n    @", BARRIER, ""),
        "no barrier within a sum": kernels("= sum;\n    @", BARRIER, ""),
        # ---- sums of a block ----
        "shifted slot": sums("slots[run + @]", "blockIdx.x", "blockIdx.x + (run > 0)"),
        "a run that began in the block before": sums("? 0 : @) +", "first / inner", "(first + inner - 1) / inner"),
        "a run that begins in another place": sums("begin = @;", "run * inner - first", "run * inner"),
        "not all runs of a lane": sums("all_lanes ? 1 : @;", "kWarpThreads", "2 * kWarpThreads"),
        "runs in the slot before": sums("run += @;", "runs_at_a_time", "1"),
        "neurons beyond the last": sums("? @ : kBlockThreads", "static_cast<int>(left)", "kBlockThreads * kLanes"),
        "threads before a run": sums("begin > 0 ? @ :", "static_cast<uint32>(begin) / kLanes", "0"),
        "threads beyond a run": sums("<uint32>(@ ? begin + inner", "begin + inner < neurons", "false"),
        "threads of single neurons": sums(": neurons) / @;", "kLanes", "1"),
        "each lane from the first thread on": sums("first_thread + @;", "lane_of_run", "0"),
        "not all threads of a run": sums("thread += @)", "lanes_each", "2 * lanes_each"),
        "wrong lane in a sum": sums("sum += @;", SHUFFLE, SHUFFLE.replace("down", "up")),
        "sums of short runs from other lanes": sums("if (@) {\n#pragma unroll\n      for", "all_lanes", "true"),
        "the sum of another lane": sums("if (@) slots", "lane_of_run == 0", "lane_of_run == lanes_each - 1"),
        # ---- sums of all blocks ----
        "blocks of another parameter": sums("for (; @; ++id)", "block >= sum.parts[id].blocks",
                                            "block > sum.parts[id].blocks"),
        "not all slots of a thread": sums("left > 0; left -= @,", "slots_each", "2 * slots_each"),
        "not all runs of a thread": sums("run += @)", "part.runs_each * count", "2 * part.runs_each * count"),
        "not all slots loaded together": sums("left -= @)", "kLoads * slots_each", "(kLoads + 1) * slots_each"),
        "slots beyond the last loaded together": sums("left > @;", "(kLoads - 1) * slots_each",
                                                      "(kLoads - 2) * slots_each"),
        "not all first runs": sums("first_run = @;", "turn * (part.elements_each * part.runs_each) / kSumThreads", "0"),
        "not all first slots": sums("first_slot = @;", "turn & (slots_each - 1)", "0"),
        "elements of another thread": sums("elements_each + (@);", "thread & (part.elements_each - 1)",
                                           "thread % kWarpThreads & (part.elements_each - 1)"),
        "all steps in one": sums("t = @ ?", "part.parameter.step_stride != 0", "false"),
        "runs of another element": sums("first_run * @;", "count", "(count > 1 ? count - 1 : 1)"),
        "the wrong tile of a run": sums("= whole_tiles(@, sum.tile);", "run * inner", "run * inner + inner - 1"),
        "a run without its last slot": sums("= whole_tiles(@, sum.tile) - tile", "(run + 1) * inner - 1",
                                            "run * inner"),
        "a run with a slot beyond it": sums("tile + @;", "1", "1 + (run > 0)"),
        "slots of another step": sums("(t * @ + run", "part.partials.slots", "(part.partials.slots - 1)"),
        "tiles of single neurons": sums("> kBlockThreads ? @ :", "of_single_neurons / 4", "of_single_neurons"),
        "no barrier in a tree": sums("{\n    @\n    if (thread < half)", BARRIER, ""),
        "a tree without its last half": sums("half >= @;", "part.elements_each", "2 * part.elements_each"),
        "totals of too many threads": sums("if (@ && element", "thread < part.elements_each",
                                           "thread < 2 * part.elements_each"),
        "elements beyond the last": sums("&& @) part.store", "element < part.elements(sum.shape)",
                                         "true"),
        # ---- kernel choice, indices ----
        "settled in spite of a step stride": params("&& @) return Input::kGeneral", "parameter.step_stride != 0",
                                                    "false"),
        "settled in spite of v_rest": params("if (@ ||", "options.v_rest != Real(0)", "false"),
        "settled in spite of optional rules": params("|| @) return Input::kGeneral", "options.has_optional_rules()",
                                                     "false"),
        "plain in spite of a gain": params("return @ && is", "is(kInputGain, Real(1))", "true"),
        "plain in spite of a bias": params("&& @ &&", "is(kInputBias, Real(0))", "true"),
        "plain in spite of a mean": params("&& @;", "is(kInputMean, Real(0))", "true"),
        "settled in spite of v_seq": params("return @ && h_seq", "v_seq == nullptr", "true"),
        "settled in spite of h_seq": params("&& @ && !this->options.scale_output;", "h_seq == nullptr", "true"),
        "settled in spite of scaled spikes": params("&& @;", "!this->options.scale_output", "false"),
        "settled without a gradient of the spikes": params("return @ &&", "grad_s_seq != nullptr", "true"),
        "settled though no input's gradient is asked for": params("&& @ &&",
                                                                  "(grad_x_seq != nullptr || grad_residual != nullptr)",
                                                                  "true"),
        "settled in spite of v_seq's gradient": params("&& @ &&", "grad_v_seq == nullptr", "true"),
        "settled in spite of h_seq's gradient": params("           @ &&", "grad_h_seq == nullptr", "true"),
        "settled backward in spite of scaled spikes": params("@ && !wants", "!this->options.scale_output", "true"),
        "settled in spite of a mean's gradient": params("&& @;", "!wants(kInputMean)", "true"),
        "an index in common for all": thread_neuron("if (@) {", "summary.alike", "true"),
        "the index of the first neuron": thread_neuron("common.of(@)", "n", "0"),
        "an own index of the first neuron": thread_neuron("own[id].of(@)", "n", "0"),
        "the own index of another parameter": thread_neuron("own[@].of", "id", "id == kDecay ? kWidth : id"),
        "a quotient that is too small": divisor("by) + @;", "1", "0"),
        "a remainder of another number": divisor("- quotient(number) * @;", "by", "(by - 1)"),
        # ---- rules by options ----
        "several spikes of a negative potential": rules("(@ ? Real(1)", "h > Real(0)", "true"),
        "shares of a spike": rules("* @;\n    return choose", "math::trunc(h / neuron.v_threshold)",
                                   "(h / neuron.v_threshold)"),
        "single spikes": rules("choose(@, several", "multi_spike", "false"),
        "a floor for all": rules("choose(@, (above", "floored", "true"),
        "a floor too low": rules("above) + @, v)", "v_min", "Real(-0.4)"),
        "gradients through the floor": kernels(
            "@", "model.floor_adjoint(h.values[j], s, neuron.now(), lane(d_state, j));", ""
        ),
        "gradients through the floor before reset": rules("above = @ - v_min;\n    d_state",
                                                          "after_reset(h, s, neuron)", "h"),
        "no gradients though there is no floor": rules("choose(@, above <=", "floored", "true"),
        "a hard reset for all": rules("choose(@, hard.v", "this->hard_reset", "true"),
        "a hard reset's gradient for all": rules("choose(@, Hard::gradient_of_reset", "this->hard_reset", "true"),
        "a soft reset's gradient of spikes for all": rules("choose(@, Hard::spike_gradient", "this->hard_reset",
                                                           "false"),
        "a soft reset's gradient for all": rules("from_v = choose(@,", "this->hard_reset", "false"),
        "a periodic surrogate for all": rules("choose(@, h < neuron", "periodic", "true"),
        "a period that begins at the threshold": rules("v_threshold - @;", "Real(0.5)", "Real(0)"),
        "width's gradient of no distance": kernels("step.dy * @;", "model.distance(h.values[j], neuron.now())",
                                                   "(h.values[j] - neuron.now().v_threshold)"),
        "the first surrogate for all": Mutant("math/surrogates.h", "if (@) return any_surrogate",
                                              "static_cast<int>(surrogate) != kId", "false"),
        # ---- launchers ----
        "x may be misaligned": plans("shared && @", "is_aligned(params.x_seq)", "true"),
        "v_init may be misaligned": plans("&& @ &&", "is_aligned(params.init)", "true"),
        "outputs may be misaligned": plans("(@)", "is_aligned(sequences_and_states) && ...", "true"),
        "checkpoints may be misaligned": launchers("params.h_seq, @)", "params.checkpoints", "params.last"),
        "rows may be misaligned": plans("params.shape.inner % @ == 0", "4", "2"),
        "four need not share a parameter": plans("|| @)", "parameter.inner % 4 == 0", "true"),
        "fours for few neurons in general": plans("general ? @ :", "neurons / 4 >= resident / 4",
                                                      "neurons >= resident / 4"),
        "fours for few neurons and long sequences": plans(": @;\n  return error", "neurons > resident / 16",
                                                              "true"),
        "no fours for a whole segment": plans("!general && @;", "params.shape.steps <= kCheckpointSteps",
                                                  "params.shape.steps < kCheckpointSteps"),
        "forward of exactly four for fewer steps": launchers(
            "(@) {\n          kernel = &lif_forward", "params.shape.steps == kShortSequence",
            "params.shape.steps <= kShortSequence",
        ),
        "backward of exactly four for fewer steps": launchers(
            "(@) {\n          kernel = &lif_backward", "params.shape.steps == kShortSequence",
            "params.shape.steps <= kShortSequence",
        ),
        "tensors as constants": plans("if (@) summary.tensors", "parameter.data != nullptr", "false"),
        "alike in spite of other runs": plans("alike && @ &&", "parameter.inner == inner", "true"),
        "alike in spite of another count": plans("&& @;\n    summary", "parameter.count == count", "true"),
        "a step from neuron to neuron for all": plans("if (@) continue;\n    if (count",
                                                          "parameter.is_same_for_all()", "parameter.data == nullptr"),
        "no step from neuron to neuron": plans("strides[id] = @;", "1", "0"),
        "own runs of one neuron": plans("own[id] = index(@,", "params.parameters[id].inner", "1"),
        "runs in common of one neuron": plans("common = index(@,", "inner", "1"),
        "no gradients wanted": plans("static_cast<uint32>(@) << id", "params.wants(id)",
                                         "id != kDecay && params.wants(id)"),
        "too few slots for a whole block": launchers("if (@) {", "slots >= kManySlots", "slots > kManySlots"),
        "not the largest power": launchers("while (@)", "2 * power <= most", "2 * power < most"),
        "runs that there are not": launchers("runs < kMostRunsEach ? @ :", "runs", "kMostRunsEach"),
        "too few blocks of a sum": launchers("(sum.shape), @);", "part.elements_each", "part.elements_each + 1"),
    },
    "batch_norm_test": {
        "no barrier before moments are joined": channels("= own;\n  @", BARRIER, ""),
        "no barrier between ways": NO_BARRIER_OF_CHANNELS,
        "no barrier between neighbours": channels("\n    @\n  }\n  return", BARRIER, ""),
        "no gain of the residual's normalisation": channels("dx[k][j] = @ * dx[k][j]", "gain", "Real(1)"),
        "no residual gain": channels("dr[j] = @ * dx", "params.residual_gain", "Real(1)"),
        "the residual's gradient is left": channels("if (@) Lanes::store(dr",
                                                    "params.residual_gain != Real(1)", "false"),
        "no barrier before slots are joined": channels("= found;\n    @", BARRIER, ""),
        "no barrier between slots": channels("moments[thread + half]);\n      @", BARRIER, ""),
        "all units live": channels("way < tiles.ways && @", "unit < task.units", "true"),
        "all ways live": channels("live(@ &&", "way < tiles.ways", "true"),
        "joined beyond the channel": channels("tiles.tiles_per_channel > 1 ? @ :", "tiles.width",
                                              "tiles.units_per_channel"),
        "a neighbour too many": channels("index.way == 0 && @)", "index.rank < left - half",
                                         "index.rank <= left - half"),
        "a neighbour left out": channels("half = @;\n    if (index.way == 0", "(left + 1) / 2", "left / 2"),
        "a way left out": channels("if (@)", "index.way < left - half", "index.way + 1 < left - half"),
        "a row too many": channels("sums.add(x, @)", "left", "left < kTogether ? left + 1 : left"),
        "a row left out": channels("[kLanes], int rows) {@", "", "--rows;"),
        "a row too many in the mean": channels("k < rows ? x[k][j] : @;", "x[0][j]", "x[k][j]"),
        "a row too many in the sums": channels("k < rows ? x[k][j] - m : @;", "Real(0)", "x[k][j] - m"),
        "a row too many in the number": channels("n = @ * kLanes", "rows", "kRows"),
        "wrong mean in a sum": channels("sum += n * offset + @;", "distance", "0"),
        "wrong mean in squares": channels("n * offset + @)", "2 * distance", "distance"),
        "wrong row": channels("(element + @ * stride), x[k]);\n      }", "k", "(k % 3)"),
        "wrong stride": channels("stride = @;\n  Moments", "index.step * tiles.shape.columns()",
                                 "tiles.shape.columns()"),
        "wrong column": channels("inner + @;", "position * kLanes", "position"),
        "wrong slot": channels("moments[@ *", "index.task.slot", "index.task.slot / 2"),
        "wrong slots joined": channels("slot += @)", "kBlockThreads", "kBlockThreads + 1"),
        "too many channels": channels("if (@) params.compute", "channel < params.channels", "true"),
        "not all channels": channels("(channel < @))) params.compute", "params.channels", "params.channels - 1"),
        "running statistics of no channel": channels("if (@) params.update", "channel < params.channels", "true"),
        "the last running statistics stay": channels("(channel < @))) params.update", "params.channels",
                                                     "params.channels - 1"),
        "a batch counted by each channel": channel_params("if (@ && num_batches", "channel == 0", "channel < 2"),
        "a running variance of another row": channel_params("running_var[channel], coefficients[@ *",
                                                            "kCoefficientVariance", "kCoefficientGain"),
        "a share of another size": channel_params("running + @ * distance", "momentum", "(Real(1) - momentum)"),
        "a share of 1 leaves something": channel_params(" * distance : @;",
                                                        "value - distance * (Real(1) - momentum)",
                                                        "running + momentum * distance"),
        "wrong end of rows": channels("if (@) {\n        int64 stored", "row + k * index.step < index.end_row",
                                      "row + k < index.end_row"),
        "wrong mean": channels("params.mean[@]", "index.channel", "index.task.first_channel"),
        "units of the wrong tile": channel_params("first_unit = @;", "tile * tiles.width", "tile"),
        "tile beyond the last channel": channel_params("left < tiles.channels_per_tile ? @ :", "left",
                                                       "tiles.channels_per_tile"),
        "too many splits": channel_params("rows_per_split = @;", "enough > needed ? enough : needed", "enough"),
        "x of a channel may be misaligned": channel_launchers("&& @ &&", "is_aligned(x_seq)", "true"),
        "dx of a channel may be misaligned": channel_launchers("(@ && ...);", "is_aligned(gradients)",
                                                                  "(gradients != nullptr || true)"),
        "channels may share four": channel_launchers("tiles.shape.inner % @ == 0", "4", "2"),
    },
    "integrator_test": {
        "all live": ALL_LIVE,
        "the last step is not loaded": integrator("load_steps(@, next)", "left - kSteps", "left - kSteps - 1"),
        "no delay": integrator("out[j] = @;", "params.delay ? before[j] : state.v[j]", "state.v[j]"),
        "parameters of another step": integrator("t = @;\n      neuron", "kBack ? left - 1 - k : steps - left + k",
                                                 "k"),
        "decay's gradient of another step": integrator(
            "params.v_seq + (@)", "params.delay ? load_element : load_element + stride", "load_element"
        ),
        "decay's gradient without a first potential": integrator(
            "dv * ((@) - v_rest)", "t == 0 ? state.v[j] : before[j]", "before[j]"
        ),
        "decay's gradient without a potential at rest": integrator(") - @);\n          if (kSums)", "v_rest",
                                                                   "Real(0)"),
        "a gradient of the last state forgotten": integrator("if (@) load(", "kBack && exists(params.grad_last)",
                                                             "false"),
        "no tail check of the first state": integrator("exists(end) && @)", "index.live", "true"),
        "sums of later steps as well": integrator("= sums[i];\n      @", "sums[i] = Real(0);", ""),
        "sums of all steps in one row": integrator(".data + @ * params", "t", "int64(0)"),
        "the gain's sum for decay": integrator("thread_sums[@]);", "warp", "1 - warp"),
        "no barrier between two sums": integrator("if (stored == 0) return;\n    @", BARRIER, ""),
        "no barrier within a sum": integrator("}\n    @\n    const int warp", BARRIER, ""),
        "v may be misaligned": integrator_launchers("groups_of_four(params, @, params.last", "params.v_seq",
                                                    "params.x_seq"),
        "no kernel for sums": Mutant("params/integrator.h", ": @ ?", "wants(kDecay) || wants(kInputGain)", "false"),
        "no kernel for four": integrator_launchers("if (@) kernel", "params.tiles.tile > kBlockThreads", "false"),
    },
}  # fmt: skip

# Mutants of the CPU kernels, found by the same programs.
cpu = partial(Mutant, "cpu/neuron.cpp")
cpu_integrator = partial(Mutant, "cpu/integrator.cpp")
tiles = partial(Mutant, "cpu/tile.h")
rows = partial(Mutant, "cpu/rows.h")
loops = partial(Mutant, "cpu/loops.h")
norm = partial(Mutant, "cpu/normalisation.cpp")

PIECES = "for_each_stretch(tile, @, [&](int64 n, int64 offset, int64 length) {"

CPU_MUTANTS = {
    "kernels_test": {
        "no residual gain": loops("kResidual ? c + @ * residual[i]", "args.residual_gain", "Real(1)"),
        "no residual gain in general loops": loops("+ @ * args.residual[i];", "args.residual_gain", "Real(1)"),
        "the residual of the tile's first stretch": tiles("kResidual ? residual + @ : nullptr", "i", "0"),
        "no current in general loops": tiles("neurons.row.input_gain = @;", "ones_", "zeros_"),
        "the residual's gradient left": cpu("finish_row(dc, @, tile_, t)", "grad_residual", "grad_x_seq"),
        "a stretch too long": rows("return {@, inner", "inner - tile.first % inner", "inner"),
        "a channel's stretch too long": tiles("for_each_stretch(tile_, @,", "shared_ == 0 ? kTile : shared_",
                                              "shared_ == 0 ? kTile : 2 * shared_"),
        "parameters taken as alike": tiles(
            "shared_ == 0 || (@)", "parameter.inner == shared_ && parameter.count == count_", "true"
        ),
        "a parameter's run too long": tiles("runs_of(tile, @), inverse", "parameter.inner", "2 * parameter.inner"),
        "a parameter's last value stays": loops("== args.count ? @ :", "0", "index"),
        "a sum's run too long": tiles("runs_of(tile, @), slots", "parameter.inner", "2 * parameter.inner"),
        "a sum without the run's later tiles": cpu("for (; @; ++tile) totals", "(tile + 1) * sum.tile < end", "false"),
        "a sum across a tile's end": cpu("std::min(length - i, @)", "(tile + 1) * sum.tile - (run + i)", "length"),
        "parameters turn too late": tiles("for_each_stretch(tile, @,", "parameter.count", "2 * parameter.count"),
        "noise of another tile": tiles("if (@) {\n      first_ = tile.first", "tile.first != first_", "first_ < 0"),
        "noise of another step": tiles("rows_.row(2 * slot + @)", "t % 2", "0"),
        "noise of an earlier segment": tiles("if (@)", "pairs_[slot] != pair", "pairs_[slot] < 0"),
        "one value for several channels": tiles(
            "|| @);", "tile.first % parameter.inner + tile.length <= parameter.inner", "true"
        ),
        "parameters of another tile": tiles("if (@ && (t == t_", "tile.first == first_", "first_ >= 0"),
        "parameters of another step": tiles("(@ || !per_step_)", "t == t_", "true"),
        "a row of another tile": tiles("pattern = {@, is_per_step", "phase", "int64(0)"),
        "a row of another step": tiles(", @};", "is_per_step(id) ? t : 0", "0"),
        "a row beyond the parameter": tiles(
            "&&\n                          @;", "phase + tile.length <= parameter.count", "phase < parameter.count"
        ),
        "rows of the input of another tile": tiles("period_ < kTile && @",
                                                   "tile.first % count_ == tile_.first % count_", "true"),
        "rows of the input repeat too early": tiles("period_ = @", "std::max<int64>(1, kInputSums / count_) * count_",
                                                    "kInputSums"),
        "wrong checkpoint read": tiles("params.checkpoints, checkpoint(tile, @), params.at_rest()", "start",
                                       "int64(kCheckpointSteps)"),
        "no last checkpoint": cpu("kCheckpointSteps == 0 && @)", "steps < params.shape.steps",
                                  "steps + kCheckpointSteps < params.shape.steps"),
        "decay's gradient of another step": cpu("accumulate(kDecay, Real(1), dh_, {state(@).v", "k", "k + 1"),
        "decay's gradient of another settled step": cpu(".v = state(@).v", "t - start", "t - start + 1"),
        "wrong sign of the soft reset's gradient": loops(
            "d_reset[i] = @;", "model.gradient_of_reset(d_state.v, args.s[i])", "d_state.v * args.s[i]"
        ),
        "single spikes without a floor": rules("return @ ||", "multi_spike", "false"),
        "no floor of single spikes": rules("|| @;", "floored", "false"),
        "gradients through the floor": loops("@", "model.floor_adjoint(args.h[i], args.s[i], neuron, d_state);", ""),
        "width's gradient of no distance": loops("args.distance[i] = @;", "model.distance(args.h[i], neuron)",
                                                 "args.h[i]"),
        "one surrogate for all": loops("args.options.surrogate = @;", "static_cast<Surrogate>(kId)",
                                       "Surrogate::kRectangle"),
        "a carried gradient forgotten": cpu(
            "Real(0));\n    carried_ = @;", "exists(params_.grad_last)", "false"
        ),
        "settled forward in spite of potentials": cpu("return params.v_seq == nullptr && @;",
                                                      "params.h_seq == nullptr", "true"),
        "settled backward in spite of potentials": cpu("return params.grad_v_seq == nullptr && @ &&",
                                                       "params.grad_h_seq == nullptr", "true"),
        "settled in spite of a hard reset's gradient": cpu("!(@ &&", "params.wants(kReset)", "false"),
        "settled in spite of a potential at rest": cpu("&& @ &&", "params.options.v_rest == 0", "true"),
        "folded sums end where they turn": cpu("totals.data(), @}", "used - before_turn", "int64(0)"),
        "a row read in pieces too long": rows(f"{PIECES}\n    run<ConvertLoop<Element,", "tile.shape.inner",
                                              "2 * tile.shape.inner"),
        "a row written in pieces too long": rows(f"{PIECES}\n    run<ConvertLoop<Real_t<Element>,", "tile.shape.inner",
                                                 "2 * tile.shape.inner"),
        "a row read in place though in pieces": rows("if (@) return sequence", "tile.in_one_piece()", "true"),
        "a row written in place though in pieces": rows("sequence != nullptr && @) return", "tile.in_one_piece()",
                                                        "true"),
        "a sum without its last": loops("for (int lane = 0; @; ++i, ++lane) lanes[lane]", "i < length",
                                        "i + 1 < length"),
        "width's gradient without a threshold": loops("step.dy * (@)", "h - neuron.v_threshold", "h"),
        "threshold's gradient without a width": loops("step.dy * @;", "neuron.inverse_width", "Real(1)"),
        "soft reset's gradient without a spike": loops("keep_if(args.carried, @);", "d_state.v * s", "d_state.v"),
        "gain's gradient without a mean": loops("gain_sum[i] += dh[i] * (@)", "x[i] - neuron.input_mean", "x[i]"),
    },
    "batch_norm_test": {
        "no residual gain": norm("if (@) {\n        run<MultiplyLoop", "params.residual_gain != Real(1)", "false"),
        "no gain of the residual's normalisation": norm("normalisation_adjoint(@ * args.dh[i]",
                                                        "args.gain.template at<kRows>(i)", "Real(1)"),
        "moments without the last value": norm("for (int lane = 0; @; ++i", "i < args.length", "i + 1 < args.length"),
        "moments of the last chunk's columns": norm("longest = @;", "std::max(longest, chunk)", "chunk"),
        "moments in the wrong slot": norm("params_.moments[@ *", "task_.slot", "task_.slot / 2"),
        "moments of one slot": norm("join(found, params.moments[@ *", "slot", "int64(0)"),
        "columns of the first tile": norm("f(row * tiles.shape.columns() + @,", "column", "int64(0)"),
        "a channel beyond its tile": norm("length = @;\n      f(channel", "std::min(tiles.units_per_channel, "
                                          "task.units - in_row)", "tiles.units_per_channel"),
        "the mean of another channel": norm("values[i][@]};", "channel", "i == 0 ? int64(0) : channel"),
    },
    "integrator_test": {
        "no delay": cpu_integrator("args.out[i] = @;", "args.delay ? before : state", "state"),
        "parameters of another step": cpu_integrator("neurons.move_to(tile, @);", "t", "int64(0)"),
        "decay's gradient of another step": cpu_integrator("tile, @, v_buffer", "params.delay ? t : t - 1", "t"),
        "decay's gradient with the first potential twice": cpu_integrator("kBack && @ && params.wants(kDecay)", "t > 0",
                                                                          "t > 1"),
        "decay's gradient without a potential at rest": cpu_integrator("dv * (@)", "args.before[i] - args.v_rest",
                                                                       "args.before[i]"),
        "sums of later steps as well": cpu_integrator("t, sum);\n        @", "begin_sums(sum);", ""),
        "sums of steps with the others": cpu_integrator("!= 0) != @) continue", "per_step", "false"),
        "steps in the wrong order": cpu_integrator("return @; };", "kBack ? steps - 1 - row : row", "row"),
    },
}  # fmt: skip
