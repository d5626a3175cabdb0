// The settled CPU kernels, which are faster than the general kernels of cpu/neuron.h. They compute only calls whose
// parameters are constant over time and which need only spikes and the last state. is_settled() in cpu/neuron.cpp has
// the exact conditions.
#include "cpu/models.h"
#include "cpu/neuron.h"

namespace asgl::cpu {
namespace {

// The number of steps of a chunk if the loop uses streaming stores and reads the currents from a buffer.
constexpr int64 kStreamedSteps = 4;

// How many elements ahead a loop prefetches from the rows that it uses, with ordinary stores and with streaming stores.
constexpr int64 kElementsAhead = 256, kElementsAheadOfStores = 512;

// Adjacent steps of a tile that one call of a loop computes.
struct Chunk {
  Tile tile;
  int64 t, count;
};

// The address from which a loop over a chunk prefetches a sequence. If the loop itself uses the sequence, the address
// is some blocks ahead in the first row of the chunk. Otherwise it is the first row of `next`, a later chunk.
template <class Element>
const char* element_to_prefetch(const Element* sequence, const Chunk& chunk, const Chunk& next, bool used_by_loop,
                                bool streams = false) {
  if (!used_by_loop) return row_to_prefetch(sequence, next.tile, next.t);
  const char* row = row_to_prefetch(sequence, chunk.tile, chunk.t);
  return row == nullptr ? nullptr : row + (streams ? kElementsAheadOfStores : kElementsAhead) * sizeof(Element);
}

// Computes the input current of a chunk: x in place, or rows in a buffer.
template <class Scalar>
class ChunkCurrents {
  using Real = Real_t<Scalar>;

 public:
  ChunkCurrents(const LIFParams<Scalar>& params, int64 most_steps)
      : params_(params), input_(params), rows_(most_steps + 2, kTile) {}

  TileInput<Real>& input() { return input_; }
  // Whether the currents are the rows of x in place.
  bool is_x_in_place(const Tile& tile) const { return input_.is_plain() && is_in_place<Scalar>(tile); }
  // The buffer for currents that are not x in place.
  StepRows<Real> buffer_rows() { return {rows_.row(2), rows_.stride()}; }

  // Returns the current of each step of a chunk.
  StepRows<const Real> compute(const Chunk& chunk) {
    const Tile& tile = chunk.tile;
    if (is_x_in_place(tile)) return read_steps(params_.x_seq, tile, chunk.t, rows_.row(0));
    const StepRows<Real> currents = buffer_rows();
    for (int64 k = 0, t = chunk.t; k < chunk.count; ++k, ++t) {
      const Real* x = read_row(params_.x_seq, tile, t, input_.is_plain() ? currents[k] : rows_.row(0));
      if (input_.is_plain()) continue;
      input_.compute_current(
          x, params_.residual == nullptr ? nullptr : read_row(params_.residual, tile, t, rows_.row(1)), currents[k]);
    }
    return {currents.first, currents.stride};
  }

 private:
  const LIFParams<Scalar>& params_;
  TileInput<Real> input_;
  Rows<Real> rows_;
};

// ---- forward ----

// Runs the settled forward pass of all tiles.
template <class Model, class Scalar>
void run_settled_pass(const ForwardParams<Scalar>& params) {
  using Real = Real_t<Scalar>;
  const int64 steps = params.shape.steps;
  for_each_tile_range(params.shape, [&](int64 begin, int64 end) {
    ChunkCurrents<Scalar> currents(params, kStreamedSteps);
    Rows<Real> rows(2, kTile);
    Real *v = rows.allocate(), *s_buffer = rows.allocate();
    TileNoise noise(params.noise);
    TileNeurons<Real> neurons(params.parameters, params.options, kInputGain);
    const StreamingStore past_cache = streaming_store_for(params.s_seq, params.shape);
    for (int64 index = begin; index < end; ++index) {
      const Tile tile(params.shape, index);
      const bool s_in_place = is_in_place<Scalar>(tile), all_in_place = s_in_place && currents.is_x_in_place(tile);
      const bool prefetches = recent_row_to_prefetch(params.x_seq, tile, 0) != nullptr;
      const StreamingStore stream = s_in_place ? past_cache : nullptr;
      // If x fits in the L2 cache, chunks of one step are faster. In a longer chunk, the load of x for a step waits for
      // the store of s of the step before, if both have the same offset in their pages (4K aliasing).
      const int64 most = all_in_place && prefetches ? kCheckpointSteps : stream != nullptr ? kStreamedSteps : 1;
      neurons.move_to(tile, 0);
      currents.input().move_to(tile);
      load_state(params.v_init, tile.first, params.options.v_rest, tile.length, v);
      for (int64 t = 0, count; t < steps; t += count) {
        count = std::min(most, steps - t);
        const Chunk chunk = {tile, t, count};
        const int64 later = t + std::max(most, kRowsAhead);
        const Chunk next = {{params.shape, index + later / steps}, later % steps, count};
        PrefetchRows ahead = {.element_size = sizeof(Scalar), .stride = params.shape.inner};
        if (prefetches) {
          ahead.rows[0] = element_to_prefetch(params.x_seq, chunk, next, all_in_place, stream != nullptr);
          ahead.rows[1] = element_to_prefetch(params.residual, chunk, next, false);
          if (stream == nullptr) ahead.rows[2] = element_to_prefetch(params.s_seq, chunk, next, s_in_place);
        }
        const StepRows<const Real> current = currents.compute(chunk);
        const StepRows<Real> s = start_steps(params.s_seq, tile, t, s_buffer);
        neurons.template with_neurons<SettledRows<Real>>([&](auto values) {
          run<SettledStepLoop<Real, Model, decltype(values)>>(
              {.neurons = values,
               .options = params.options,
               .analog_below = params.noise.analog_below,
               .length = tile.length,
               .block = ahead.empty() && most == 1 ? std::max<int64>(1, tile.length) : kBlock,
               .steps = count,
               .current = current,
               .draws = noise.draws_of_steps(tile, t, count),
               .v = v,
               .s = s,
               .stream = stream,
               .ahead = ahead});
        });
        if (!s_in_place) finish_row(s.first, params.s_seq, tile, t);
        store_checkpoint(params, tile, t + count, StateRows<1, Real>{v});
      }
      store_state(v, tile.length, params.v_last, tile.first);
    }
    if (past_cache != nullptr) fence_streaming_stores();
  });
}

// ---- backward ----

// Computes the settled backward pass, one tile at a time, in segments from the last to the first.
template <class Model, class Scalar>
class SettledBackward {
  using Real = Real_t<Scalar>;

 public:
  explicit SettledBackward(const BackwardParams<Scalar>& params) : params_(params) {
    std::fill_n(zeros_, kTile, Real(0));
  }

  // Computes the gradients of a tile, and stores the tile's partial sums of the parameters' gradients.
  void compute_tile(const Tile& tile) {
    neurons_.move_to(tile, 0);
    input().move_to(tile);
    input().clear_sums();
    load_state(params_.grad_v_last, tile.first, Real(0), tile.length, dv_);
    const int num_sums = sums_all_ ? kInputGain : params_.wants_gradient(kWidth) ? 1 : 0;
    for (int id = 0; id < num_sums; ++id) std::fill_n(sums_row(id), tile.length, Real(0));
    carried_ = params_.grad_v_last != nullptr;
    for (int64 start = last_start_; start >= 0; start -= segment_) {
      load_start_states(params_, tile, start, StateRows<1, Real>{v_});
      backward_segment(segment(tile, start), start > 0 ? segment(tile, start - segment_)
                                                       : segment(Tile(params_.shape, tile.index + 1), last_start_));
      carried_ = true;
    }
    for (int id = 0; id < kInputGain; ++id) {
      if (!params_.wants_gradient(id)) continue;
      store_partial_sums(params_.partials[id], params_.parameters[id], tile, 0, sums_row(id));
    }
    for (const ParameterId id : {kInputGain, kInputBias}) {
      if (params_.wants_gradient(id)) input().store_partial_sums(id, params_.partials[id]);
    }
    store_state(dv_, tile.length, params_.grad_v_init, tile.first);
    if (past_cache_ != nullptr) fence_streaming_stores();
  }

 private:
  TileInput<Real>& input() { return currents_.input(); }
  // The row of sums of a parameter's gradient.
  Real* sums_row(int id) const { return sums_ + id * rows_.stride(); }
  // The segment of a tile that begins with step `start`.
  Chunk segment(const Tile& tile, int64 start) const {
    return {tile, start, std::min(segment_, params_.shape.steps - start)};
  }

  // Returns the rows of the gradient of s for the steps of a chunk.
  StepRows<const Real> spike_gradients(const Chunk& chunk) {
    if (params_.grad_s_seq == nullptr) return {zeros_, 0};
    if (is_in_place<Scalar>(chunk.tile)) return read_steps(params_.grad_s_seq, chunk.tile, chunk.t, g_);
    for (int64 k = 0; k < chunk.count; ++k) {
      read_row(params_.grad_s_seq, chunk.tile, chunk.t + k, g_ + k * rows_.stride());
    }
    return {g_, rows_.stride()};
  }

  // Computes the gradients of a chunk, which is a segment. `next` is the chunk that is computed after it.
  void backward_segment(const Chunk& chunk, const Chunk& next) {
    const Tile& tile = chunk.tile;
    const bool in_place = is_in_place<Scalar>(tile), x_in_place = currents_.is_x_in_place(tile);
    Scalar* const grad_current = dx_is_dc_ && params_.grad_x_seq ? params_.grad_x_seq : params_.grad_residual;
    // If dc, the gradient of the current, can't be stored in place, it overwrites the buffer for currents.
    const bool dc_in_place = in_place && grad_current != nullptr;
    const StepRows<Real> dc = dc_in_place ? start_steps(grad_current, tile, chunk.t, zeros_) : currents_.buffer_rows();
    // If possible, dx is stored past the cache, but not if it is dc itself and is read again for the residual's
    // gradient.
    const bool streams = in_place && past_cache_ != nullptr && !(dx_is_dc_ && params_.grad_residual != nullptr);
    PrefetchRows input_ahead = {.element_size = sizeof(Scalar), .stride = params_.shape.inner},
                 gradients_ahead = input_ahead;
    input_ahead.rows[0] = element_to_prefetch(params_.x_seq, chunk, next, x_in_place, streams);
    input_ahead.rows[1] = element_to_prefetch(params_.residual, chunk, next, false);
    if (prefetches_) {
      gradients_ahead.rows[0] = element_to_prefetch(params_.grad_s_seq, chunk, next, in_place, streams);
      if (!streams) {
        gradients_ahead.rows[1] = element_to_prefetch(params_.grad_x_seq, chunk, next, dc_in_place && dx_is_dc_);
      }
      gradients_ahead.rows[2] = element_to_prefetch(params_.grad_residual, chunk, next, dc_in_place && !dx_is_dc_);
    }
    const StepRows<const Real> current = currents_.compute(chunk), g = spike_gradients(chunk);
    neurons_.template with_neurons<SettledRows<Real>>([&](auto neurons) {
      const auto call = [&](auto kSums) {
        run<SettledAdjointLoop<Real, Model, decltype(neurons), kSums()>>(
            {.neurons = neurons,
             .options = params_.options,
             .analog_below = params_.noise.analog_below,
             .length = tile.length,
             .steps = chunk.count,
             .carried = carried_,
             .current = current,
             .draws = noise_.draws_of_steps(tile, chunk.t, chunk.count),
             .v = {v_, v_rows_ > 1 ? rows_.stride() : 0},
             .h = h_,
             .s = s_,
             .slope = slope_,
             .g = g,
             .dv = dv_,
             .width = sums_row(kWidth),
             .decay = sums_row(kDecay),
             .threshold = sums_row(kThreshold),
             .reset = sums_row(kReset),
             .d_current = dc,
             .stream = streams && dx_is_dc_ ? past_cache_ : nullptr,
             .input_ahead = input_ahead,
             .gradients_ahead = gradients_ahead});
      };
      if (sums_all_) return call(std::integral_constant<SettledSums, SettledSums::kAll>{});
      if (params_.wants_gradient(kWidth)) return call(std::integral_constant<SettledSums, SettledSums::kWidth>{});
      call(std::integral_constant<SettledSums, SettledSums::kNone>{});
    });
    for (int64 k = chunk.count - 1; k >= 0; --k) store_input_gradients(tile, chunk.t + k, dc[k], streams);
  }

  // Computes the gradients of x and the residual at step t from dc, and stores what the loop did not store in place. If
  // `streams`, dx is stored by streaming stores.
  void store_input_gradients(const Tile& tile, int64 t, Real* dc, bool streams) {
    if (dx_is_dc_) {
      finish_row(dc, params_.grad_x_seq, tile, t);
    } else {
      Real* const stored = start_row(params_.grad_x_seq, tile, t, dx_buffer_);
      Real* const dx = streams ? dx_buffer_ : stored;
      input().compute_input_gradient(read_row(params_.x_seq, tile, t, x_buffer_), dc, dx);
      streams ? past_cache_(reinterpret_cast<float*>(stored), reinterpret_cast<float*>(dx), tile.length)
              : finish_row(dx, params_.grad_x_seq, tile, t);
    }
    store_residual_gradient(dc, params_, tile, t, x_buffer_);
  }

  const BackwardParams<Scalar>& params_;
  const int64 segment_ = segment_steps(params_.shape.steps), v_rows_ = num_v_rows(params_, segment_);
  const int64 last_start_ = (params_.shape.steps - 1) / segment_ * segment_;
  const bool sums_all_ =
      params_.wants_gradient(kDecay) || params_.wants_gradient(kThreshold) || params_.wants_gradient(kReset);
  const bool dx_is_dc_ = params_.is_input_plain();
  const bool prefetches_ = recent_row_to_prefetch(params_.x_seq, Tile(params_.shape, 0), 0) != nullptr;
  const StreamingStore past_cache_ = streaming_store_for(params_.grad_x_seq, params_.shape);
  ChunkCurrents<Scalar> currents_{params_, segment_};
  Rows<Real> rows_{segment_ + v_rows_ + 4 + kInputGain, kTile}, block_rows_{3 * segment_, kBlock};
  Real *const g_ = rows_.allocate(segment_), *const v_ = rows_.allocate(v_rows_), *const dv_ = rows_.allocate();
  Real *const sums_ = rows_.allocate(kInputGain), *const zeros_ = rows_.allocate();
  Real *const x_buffer_ = rows_.allocate(), *const dx_buffer_ = rows_.allocate();
  Real *const h_ = block_rows_.allocate(segment_), *const s_ = block_rows_.allocate(segment_);
  Real* const slope_ = block_rows_.allocate(segment_);
  TileNoise noise_{params_.noise};
  TileNeurons<Real> neurons_{params_.parameters, params_.options, kInputGain};
  bool carried_ = false;
};

// Runs the settled backward pass of all tiles.
template <class Model, class Scalar>
void run_settled_pass(const BackwardParams<Scalar>& params) {
  run_backward_pass<SettledBackward<Model, Scalar>>(params);
}

}  // namespace

template <class Params>
void run_settled_kernel(const Params& params) {
  with_model(params.options, [&](auto model) {
    if constexpr (!decltype(model)::kOnlyGeneral) run_settled_pass<decltype(model)>(params);
  });
}

template void run_settled_kernel(const ForwardParams<Half>&);
template void run_settled_kernel(const ForwardParams<BFloat16>&);
template void run_settled_kernel(const ForwardParams<float>&);
template void run_settled_kernel(const BackwardParams<Half>&);
template void run_settled_kernel(const BackwardParams<BFloat16>&);
template void run_settled_kernel(const BackwardParams<float>&);

}  // namespace asgl::cpu
