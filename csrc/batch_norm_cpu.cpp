// Batch normalisation on the CPU. A task owns a tile of columns, rows outside, columns inside, as in lif_cpu.cpp.
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "batch_norm_launch.h"
#include "cpu_rows.h"

namespace asgl::cpu {
namespace {

constexpr int64 kRowsEach = 512;
constexpr int64 kShortSum = 64;  // rows whose sums are kept in the type of x

// sum[i] += x[i] - shift[i], and its square
template <class Real>
struct ShiftedSumLoop {
  struct Args {
    const Real *x, *shift;
    Real *sum, *squares;
    int64 length;
    Ahead ahead;
  };

  static ASGL_HOST_DEVICE void run(const Args& args) {
    const Real *x = args.x, *shift = args.shift;
    Real *sum = args.sum, *squares = args.squares;
    for_each_fetch(args.ahead, args.length, [=](int64 begin, int64 end) __attribute__((always_inline)) {
#pragma GCC ivdep
      for (int64 i = begin; i < end; ++i) {
        const Real distance = x[i] - shift[i];
        sum[i] += distance;
        squares[i] += distance * distance;
      }
    });
  }
};

template <class Real>
struct InputGradientLoop {
  struct Args {
    const Real *x, *gain_dh;
    const Real *mean, *slope, *offset;
    Real* dx;  // may be gain_dh
    int64 length;
    Ahead ahead;
  };

  static ASGL_HOST_DEVICE void run(const Args& args) {
    const Real *x = args.x, *gain_dh = args.gain_dh, *mean = args.mean, *slope = args.slope, *offset = args.offset;
    Real* dx = args.dx;
    for_each_fetch(args.ahead, args.length, [=](int64 begin, int64 end) __attribute__((always_inline)) {
#pragma GCC ivdep
      for (int64 i = begin; i < end; ++i) {
        dx[i] = normalisation_adjoint(gain_dh[i], x[i], mean[i], slope[i], offset[i]);
      }
    });
  }
};

// The columns of a task's tile, and the rows as steps of a sequence.
struct Columns {
  SequenceShape shape;
  int64 first, length;

  Columns(const ChannelTiles& tiles, const ChannelTask& task)
      : shape{1, tiles.shape.rows, tiles.shape.columns()},
        first(task.first_channel * tiles.shape.inner + task.first_unit),
        length(task.units) {}
};

// Calls f(channel, offset in the tile, length) for each channel of the tile.
template <class F>
void for_each_channel(const ChannelTiles& tiles, const ChannelTask& task, F&& f) {
  for (int64 offset = 0, channel = task.first_channel; offset < task.units; ++channel) {
    const int64 length = std::min(tiles.units_per_channel, task.units - offset);
    f(channel, offset, length);
    offset += length;
  }
}

// Calls run_task(task) for every one.
template <class F>
void for_each_task(const ChannelTiles& tiles, F&& run_task) {
  const int64 each = std::max<int64>(1, tiles.width * std::min(tiles.rows_per_split, tiles.shape.rows));
  at::parallel_for(0, tiles.tasks(), std::max<int64>(1, kElementsPerTask / each), [&](int64_t begin, int64_t end) {
    for (int64 task = begin; task < end; ++task) run_task(ChannelTask(tiles, task));
  });
}

template <class Real>
double sum_of(const Real* row, int64 length) {
  double sum;
  run<SumLoop<Real>>({row, length, &sum});
  return sum;
}

}  // namespace

ChannelTiles channel_tiles(const ChannelShape& shape) { return ChannelTiles::cut(shape, 1, kTile, kRowsEach); }

template <class Scalar>
void launch_moments(const MomentsParams<Scalar>& params) {
  using Real = Real_t<Scalar>;
  const ChannelTiles& tiles = params.tiles;
  for_each_task(tiles, [&](const ChannelTask& task) {
    const Columns columns(tiles, task);
    const int64 length = columns.length;
    Rows<Real> rows(4, kTile);
    Real *buffer = rows.take(), *shift = rows.take(), *sum = rows.take(), *squares = rows.take();
    const auto read = [&](int64 row) {
      return read_row(params.x_seq, columns.shape, columns.first, length, row, buffer);
    };
    const Real* first_row = read(task.row);
    std::vector<Real> shifts;
    for_each_channel(tiles, task, [&](int64, int64 offset, int64 stretch) {
      shifts.push_back(first_row[offset]);
      std::fill_n(shift + offset, stretch, first_row[offset]);
    });
    std::vector<double> sums(shifts.size()), squares_sums(shifts.size());
    for (int64 row = task.row; row < task.end_row;) {
      std::fill_n(sum, length, Real(0));
      std::fill_n(squares, length, Real(0));
      for (const int64 stop = std::min(task.end_row, row + kShortSum); row < stop; ++row) {
        const int64 next = std::min(row + kRowsAhead, task.end_row - 1);
        const Ahead ahead = {row_ahead(params.x_seq, columns.shape, columns.first, length, next), nullptr,
                             sizeof(Scalar)};
        run<ShiftedSumLoop<Real>>({read(row), shift, sum, squares, length, ahead});
      }
      for_each_channel(tiles, task, [&](int64 channel, int64 offset, int64 stretch) {
        sums[channel - task.first_channel] += sum_of(sum + offset, stretch);
        squares_sums[channel - task.first_channel] += sum_of(squares + offset, stretch);
      });
    }
    for_each_channel(tiles, task, [&](int64 channel, int64, int64 stretch) {
      const int64 i = channel - task.first_channel;
      const double count = static_cast<double>((task.end_row - task.row) * stretch);
      params.moments[task.slot * tiles.shape.channels + channel] =
          shifted_moments(count, static_cast<double>(shifts[i]), sums[i], squares_sums[i]);
    });
  });
}

template <class Real>
void launch_coefficients(const CoefficientsParams<Real>& params) {
  for (int64 channel = 0; channel < params.channels; ++channel) {
    Moments found = {0, 0, 0};
    if (params.moments == nullptr) {
      found = params.given(channel);
    } else {
      for (int64 slot = 0; slot < params.slots; ++slot) {
        found = join(found, params.moments[slot * params.channels + channel]);
      }
    }
    params.store(channel, found);
  }
}

template <class Real>
void launch_adjoint(const AdjointParams<Real>& params) {
  for (int64 channel = 0; channel < params.channels; ++channel) params.compute(channel);
}

template <class Scalar>
void launch_input_gradient(const InputGradientParams<Scalar>& params) {
  using Real = Real_t<Scalar>;
  const ChannelTiles& tiles = params.tiles;
  for_each_task(tiles, [&](const ChannelTask& task) {
    const Columns columns(tiles, task);
    const SequenceShape& shape = columns.shape;
    const int64 first = columns.first, length = columns.length;
    Rows<Real> rows(5, kTile);
    Real *x_buffer = rows.take(), *dx_buffer = rows.take();
    Real *mean = rows.take(), *slope = rows.take(), *offset = rows.take();
    for_each_channel(tiles, task, [&](int64 channel, int64 begin, int64 stretch) {
      std::fill_n(mean + begin, stretch, params.mean[channel]);
      std::fill_n(slope + begin, stretch, params.adjoint[channel]);
      std::fill_n(offset + begin, stretch, params.adjoint[tiles.shape.channels + channel]);
    });
    for (int64 row = task.row; row < task.end_row; ++row) {
      const int64 next = std::min(row + kRowsAhead, task.end_row - 1);
      const Ahead ahead = {row_ahead(params.x_seq, shape, first, length, next),
                           row_ahead(params.grad_x_seq, shape, first, length, next), sizeof(Scalar)};
      const Real* x = read_row(params.x_seq, shape, first, length, row, x_buffer);
      const Real* gain_dh =
          read_row(static_cast<const Scalar*>(params.grad_x_seq), shape, first, length, row, dx_buffer);
      Real* dx = start_row(params.grad_x_seq, shape, first, length, row, dx_buffer);
      run<InputGradientLoop<Real>>({x, gain_dh, mean, slope, offset, dx, length, ahead});
      finish_row(dx, params.grad_x_seq, shape, first, length, row);
    }
  });
}

#define ASGL_INSTANTIATE(Scalar)                                      \
  template void launch_moments<Scalar>(const MomentsParams<Scalar>&); \
  template void launch_input_gradient<Scalar>(const InputGradientParams<Scalar>&);
ASGL_INSTANTIATE(Half)
ASGL_INSTANTIATE(BFloat16)
ASGL_INSTANTIATE(float)
ASGL_INSTANTIATE(double)
#undef ASGL_INSTANTIATE
template void launch_coefficients<float>(const CoefficientsParams<float>&);
template void launch_coefficients<double>(const CoefficientsParams<double>&);
template void launch_adjoint<float>(const AdjointParams<float>&);
template void launch_adjoint<double>(const AdjointParams<double>&);

}  // namespace asgl::cpu
