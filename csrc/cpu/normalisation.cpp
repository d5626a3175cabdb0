// The CPU kernels of batch normalisation. They compute the moments and coefficients of each channel, and the gradients
// of the input, weight and bias. If a channel has long contiguous stretches, loops use its mean, gain and so on as
// scalars. Otherwise, for example in channels_last, loops read them from rows with one value per column.
#include <ATen/Parallel.h>

#include <vector>

#include "cpu/overloads.h"
#include "cpu/rows.h"

namespace asgl::cpu {
namespace {

constexpr int64 kTaskColumns = 65536;        // of a task at most, in long rows, so that memory is read in order
constexpr int64 kRowsPerWay = 4;             // rows_each of ChannelTiles::plan
constexpr int64 kElementsAhead = 4 * kTile;  // from the elements that a loop uses to those that it prefetches

template <class Element>
struct ShiftedSumLoop {
  struct Args {
    const Real_t<Element>* x;
    double shift;
    int64 length;
    double *sum, *squares;  // accumulated
    const Element* ahead;   // prefetched by the loop itself: for_each_prefetch would move the sums out of registers
  };

  // Adds up x - shift and (x - shift)^2 in float64. Even if the shift is far from the other values, no visible
  // precision is lost. The order of additions is fixed.
  static ASGL_HOST_DEVICE void run(Args args) {
    constexpr int kSums = 32, kLine = 64 / sizeof(Element);
    double sums[kSums] = {}, squares[kSums] = {};
    int64 i = 0;
    for (; i + kSums <= args.length; i += kSums) {
      for (int line = 0; line < kSums; line += kLine) __builtin_prefetch(args.ahead + i + line);
      for (int lane = 0; lane < kSums; ++lane) {
        const double distance = static_cast<double>(args.x[i + lane]) - args.shift;
        sums[lane] += distance;
        squares[lane] += distance * distance;
      }
    }
    for (int lane = 0; i < args.length; ++i, ++lane) {
      const double distance = static_cast<double>(args.x[i]) - args.shift;
      sums[lane] += distance;
      squares[lane] += distance * distance;
    }
    for (int half = kSums / 2; half > 0; half /= 2) {
      for (int lane = 0; lane < half; ++lane) {
        sums[lane] += sums[lane + half];
        squares[lane] += squares[lane + half];
      }
    }
    *args.sum += sums[0];
    *args.squares += squares[0];
  }
};

template <class Real>
struct ColumnSumLoop {
  struct Args {
    const Real *x, *shift;
    double *sum, *squares;
    int64 length;
  };

  // For each column i: sum[i] += x[i] - shift[i], squares[i] += (x[i] - shift[i])^2.
  static ASGL_HOST_DEVICE void run(Args args) {
#pragma GCC ivdep
    for (int64 i = 0; i < args.length; ++i) {
      const double distance = static_cast<double>(args.x[i]) - static_cast<double>(args.shift[i]);
      args.sum[i] += distance;
      args.squares[i] += distance * distance;
    }
  }
};

template <class Real, bool kResidual>
struct InputGradientLoop {
  struct Args {
    const Real *x, *dh;
    Operand<Real> mean, slope, offset, gain;  // all rows, or all values
    Real* dx;
    int64 length;
  };

  // Computes dx. Without kResidual, dx contains gain * dh on entry. With kResidual, the loop reads dh and multiplies it
  // by the gain.
  template <bool kRows>
  static ASGL_HOST_DEVICE void run_loop(Args args) {
#pragma GCC ivdep
    for (int64 i = 0; i < args.length; ++i) {
      const Real gain_dh = kResidual ? args.gain.template at<kRows>(i) * args.dh[i] : args.dx[i];
      args.dx[i] = normalisation_adjoint(gain_dh, args.x[i], args.mean.template at<kRows>(i),
                                         args.slope.template at<kRows>(i), args.offset.template at<kRows>(i));
    }
  }

  static ASGL_HOST_DEVICE void run(Args args) {
    args.mean.row != nullptr ? run_loop<true>(args) : run_loop<false>(args);
  }
};

// A task reads the sequence, [rows, columns], in chunks. If the tile has all columns, a chunk is `rows` whole rows,
// which are contiguous in memory: at most kTile elements, or one longer row. Otherwise a chunk is the tile's part of
// one row.
struct Chunks {
  int64 width, rows;

  explicit Chunks(const ChannelTiles& tiles)
      : width(tiles.width), rows(tiles.width == tiles.shape.columns() ? std::max<int64>(1, kTile / tiles.width) : 1) {}
};

// Calls f(offset, length) for each chunk of a task. The length is a multiple of task.units, the number of the task's
// columns.
template <class F>
void for_each_chunk(const ChannelTiles& tiles, const ChannelTask& task, F&& f) {
  const Chunks chunks(tiles);
  const int64 column = task.first_channel * tiles.shape.inner + task.first_unit;
  for (int64 row = task.row; row < task.end_row; row += chunks.rows) {
    f(row * tiles.shape.columns() + column, std::min(chunks.rows, task.end_row - row) * task.units);
  }
}

// Calls f(channel, offset, length) for each contiguous stretch of a channel in a chunk of `chunk` elements.
template <class F>
void for_each_stretch(const ChannelTiles& tiles, const ChannelTask& task, int64 chunk, F&& f) {
  for (int64 offset = 0; offset < chunk;) {
    int64 channel = task.first_channel;
    for (int64 in_row = 0; in_row < task.units; ++channel) {
      const int64 length = std::min(tiles.units_per_channel, task.units - in_row);
      f(channel, offset + in_row, length);
      in_row += length;
    }
    offset += task.units;
  }
}

// Splits `total` elements into pieces of at most kTile elements, which stay in the cache, and calls f(offset, length)
// for each piece.
template <class F>
void for_each_piece(int64 total, F&& f) {
  for (int64 offset = 0; offset < total; offset += kTile) f(offset, std::min(kTile, total - offset));
}

// Returns `length` elements as Real_t<Element>: the elements themselves if they have this type, or a copy in `buffer`.
template <class Element>
const Real_t<Element>* read_elements(const Element* from, int64 length, Real_t<Element>* buffer) {
  if constexpr (std::is_same_v<Element, Real_t<Element>>) return from;
  run<ConvertLoop<Element, Real_t<Element>>>({from, buffer, length});
  return buffer;
}

// Whether a channel's contiguous stretches are long enough to run a loop for each stretch.
bool loops_over_stretches(const ChannelTiles& tiles) { return tiles.shape.inner >= 32; }

// Whether stretches are long enough for ShiftedSumLoop, which adds up its lanes at the end of each stretch. With
// stretches of 49 elements, ShiftedSumLoop takes 0.57 ns per element, and ColumnSumLoop takes 0.23 ns.
bool sums_over_stretches(const ChannelTiles& tiles) { return tiles.shape.inner >= 128; }

// Calls run_task(task) for every task, in parallel.
template <class F>
void for_each_task(const ChannelTiles& tiles, F&& run_task) {
  const int64 each = std::max<int64>(1, tiles.width * std::min(tiles.rows_per_split, tiles.shape.rows));
  at::parallel_for(0, tiles.num_tasks(), std::max<int64>(1, kElementsPerTask / each), [&](int64_t begin, int64_t end) {
    for (int64 task = begin; task < end; ++task) run_task(ChannelTask(tiles, task));
  });
}

// Computes the moments of each channel over the rows of a task.
template <class Scalar>
class TaskMoments {
 public:
  using Real = Real_t<Scalar>;

  // Reads the shift of each channel, which is the channel's first value in the task.
  TaskMoments(const MomentsParams<Scalar>& params, const ChannelTask& task)
      : params_(params), tiles_(params.tiles), task_(task) {
    const int64 first = task.row * tiles_.shape.columns() + task.first_channel * tiles_.shape.inner + task.first_unit;
    for_each_stretch(tiles_, task_, task_.units, [&](int64, int64 offset, int64) {
      sums_.push_back({to_real(params.x_seq[first + offset]), 0, 0});
    });
  }

  // Computes the moments of the task's channels, and stores them in the task's slot.
  void compute() {
    sums_over_stretches(tiles_) ? accumulate_stretches() : accumulate_columns();
    for_each_stretch(tiles_, task_, task_.units, [&](int64 channel, int64, int64 length) {
      const Sums& sums = channel_sums(channel);
      const double count = static_cast<double>((task_.end_row - task_.row) * length);
      params_.moments[task_.slot * tiles_.shape.channels + channel] =
          moments_from_shifted_sums(count, static_cast<double>(sums.shift), sums.sum, sums.squares);
    });
  }

 private:
  struct Sums {
    Real shift;
    double sum, squares;
  };

  Sums& channel_sums(int64 channel) { return sums_[static_cast<size_t>(channel - task_.first_channel)]; }

  // Accumulates the sums of each channel, one contiguous stretch at a time.
  void accumulate_stretches() {
    Rows<Real> rows(1, kTile);
    Real* buffer = rows.allocate();
    for_each_chunk(tiles_, task_, [&](int64 element, int64 chunk) {
      for_each_stretch(tiles_, task_, chunk, [&](int64 channel, int64 offset, int64 stretch) {
        Sums& sums = channel_sums(channel);
        for_each_piece(stretch, [&](int64 begin, int64 length) {
          const Scalar* x_seq = params_.x_seq + element + offset + begin;
          run<ShiftedSumLoop<Scalar>>({read_elements(x_seq, length, buffer), static_cast<double>(sums.shift), length,
                                       &sums.sum, &sums.squares, x_seq + kElementsAhead});
        });
      });
    });
  }

  // Accumulates the sums of each column of the task, then adds up the columns of each channel.
  void accumulate_columns() {
    const int64 most = Chunks(tiles_).rows * tiles_.width;
    Rows<Real> rows(2, std::max(most, kTile));
    Rows<double> sums(2, most);
    Real *buffer = rows.allocate(), *shift = rows.allocate();
    double *sum = sums.allocate(), *squares = sums.allocate();
    for_each_stretch(tiles_, task_, Chunks(tiles_).rows * task_.units, [&](int64 channel, int64 offset, int64 length) {
      std::fill_n(shift + offset, length, channel_sums(channel).shift);
    });
    std::fill_n(sum, most, 0.0);
    std::fill_n(squares, most, 0.0);
    int64 longest = 0;
    for_each_chunk(tiles_, task_, [&](int64 element, int64 chunk) {
      longest = std::max(longest, chunk);
      run<ColumnSumLoop<Real>>({read_elements(params_.x_seq + element, chunk, buffer), shift, sum, squares, chunk});
    });
    for_each_stretch(tiles_, task_, longest, [&](int64 channel, int64 offset, int64 length) {
      Sums& sums = channel_sums(channel);
      for (int64 i = offset; i < offset + length; ++i) {
        sums.sum += sum[i];
        sums.squares += squares[i];
      }
    });
  }

  const MomentsParams<Scalar>& params_;
  const ChannelTiles& tiles_;
  const ChannelTask& task_;
  std::vector<Sums> sums_;
};

// Plans the tiles of all kernels in this file. A unit (see ChannelTiles) is one column, and a task reads at most
// kTaskColumns columns at a time.
ChannelTiles plan_channels(const ChannelShape& shape) {
  return ChannelTiles::plan(shape, 1, kTaskColumns, kRowsPerWay);
}

}  // namespace

template <class Scalar>
void plan_tiles_on(Device, MomentsParams<Scalar>& params) {
  params.tiles = plan_channels(params.tiles.shape);
}

template <class Scalar>
void plan_tiles_on(Device, InputGradientParams<Scalar>& params) {
  params.tiles = plan_channels(params.tiles.shape);
}

// Computes partial moments, which launch_kernel(CoefficientsParams) merges.
template <class Scalar>
void launch_kernel(Device, const MomentsParams<Scalar>& params) {
  for_each_task(params.tiles, [&](const ChannelTask& task) { TaskMoments<Scalar>(params, task).compute(); });
}

// Computes the coefficients of each channel from its partial moments, which are merged first. Without partial moments,
// as in evaluation, the mean and variance are given.
template <class Real>
void launch_kernel(Device, const CoefficientsParams<Real>& params) {
  for (int64 channel = 0; channel < params.channels; ++channel) {
    Moments found = {0, 0, 0};
    if (params.moments == nullptr) {
      found = params.given_moments(channel);
    } else {
      for (int64 slot = 0; slot < params.slots; ++slot) {
        found = merge_moments(found, params.moments[slot * params.channels + channel]);
      }
    }
    params.store(channel, found);
  }
}

// Computes dx, and the gradients of the normalisation's weight and bias.
template <class Scalar>
void launch_kernel(Device, const InputGradientParams<Scalar>& params) {
  using Real = Real_t<Scalar>;
  using Operands = std::array<Operand<Real>, 4>;  // mean, slope, offset, gain
  const ChannelTiles& tiles = params.tiles;
  std::vector<Real> slopes, offsets;
  for (int64 channel = 0; channel < tiles.shape.channels; ++channel) {
    const NormalisationAdjoint<Real> adjoint = params.adjoint(channel);
    slopes.push_back(adjoint.slope);
    offsets.push_back(adjoint.offset);
    params.store_own_gradients(channel);
  }
  const Real* const values[] = {params.mean(), slopes.data(), offsets.data(), params.gain()};
  // Returns the row that a loop reads and writes as Real: `sequence` itself if it has this type, or `buffer`.
  const auto in_place = [](Scalar* sequence, Real* buffer) {
    if constexpr (std::is_same_v<Scalar, Real>) return sequence;
    return buffer;
  };
  // Converts elements from Scalar to Real or back. Does nothing if these types are the same, because rows are then in
  // place.
  const auto convert = [](auto* from, auto* to, int64 length) {
    if constexpr (!std::is_same_v<Scalar, Real>) {
      using Loop =
          ConvertLoop<std::remove_const_t<std::remove_pointer_t<decltype(from)>>, std::remove_pointer_t<decltype(to)>>;
      run<Loop>({from, to, length});
    }
  };
  // Computes dx of `length` elements. Each operand is one value of a channel, or a row with a value for each element.
  const auto compute_dx = [&](Rows<Real>& rows, int64 element, int64 length, const Operands& operands) {
    const auto& [mean, slope, offset, gain] = operands;
    Scalar* gradient = params.grad_x_seq + element;
    const Real* x = read_elements(params.x_seq + element, length, rows.row(0));
    Real* dx = in_place(gradient, rows.row(1));
    if (params.grad_residual == nullptr) {
      convert(gradient, dx, length);
      run<InputGradientLoop<Real, false>>({x, nullptr, mean, slope, offset, gain, dx, length});
    } else {
      const Real* dh = read_elements(params.grad_residual + element, length, rows.row(2));
      run<InputGradientLoop<Real, true>>({x, dh, mean, slope, offset, gain, dx, length});
    }
    convert(dx, gradient, length);
  };
  for_each_task(tiles, [&](const ChannelTask& task) {
    if (loops_over_stretches(tiles)) {
      Rows<Real> rows(3, kTile);
      for_each_chunk(tiles, task, [&](int64 element, int64 chunk) {
        for_each_stretch(tiles, task, chunk, [&](int64 channel, int64 offset, int64 stretch) {
          Operands operands;
          for (int i = 0; i < 4; ++i) operands[i] = {nullptr, values[i][channel]};
          for_each_piece(stretch, [&](int64 begin, int64 length) {
            compute_dx(rows, element + offset + begin, length, operands);
          });
        });
      });
      return;
    }
    const int64 most = Chunks(tiles).rows * tiles.width;
    Rows<Real> rows(7, std::max(most, kTile));
    Operands operands;
    for (int i = 0; i < 4; ++i) operands[i] = {rows.row(3 + i), Real(0)};
    for_each_stretch(tiles, task, Chunks(tiles).rows * task.units, [&](int64 channel, int64 begin, int64 length) {
      for (int i = 0; i < 4; ++i) std::fill_n(rows.row(3 + i) + begin, length, values[i][channel]);
    });
    for_each_chunk(tiles, task, [&](int64 element, int64 chunk) { compute_dx(rows, element, chunk, operands); });
  });
}

template void plan_tiles(MomentsParams<Half>&);
template void plan_tiles(MomentsParams<BFloat16>&);
template void plan_tiles(MomentsParams<float>&);
template void plan_tiles(MomentsParams<double>&);
template void plan_tiles(InputGradientParams<Half>&);
template void plan_tiles(InputGradientParams<BFloat16>&);
template void plan_tiles(InputGradientParams<float>&);
template void plan_tiles(InputGradientParams<double>&);
template void launch(const MomentsParams<Half>&);
template void launch(const MomentsParams<BFloat16>&);
template void launch(const MomentsParams<float>&);
template void launch(const MomentsParams<double>&);
template void launch(const InputGradientParams<Half>&);
template void launch(const InputGradientParams<BFloat16>&);
template void launch(const InputGradientParams<float>&);
template void launch(const InputGradientParams<double>&);
template void launch(const CoefficientsParams<float>&);
template void launch(const CoefficientsParams<double>&);

}  // namespace asgl::cpu
