// Unstructured convolution: the geometry of panels and tiles.
#include "cpu/conv_unstructured_gather.h"

#include <algorithm>

#include "cpu/arena.h"

namespace sk {

namespace {

// One axis of a convolution.
struct Sizes {
    int64_t size, out_size, kernel, stride, padding, dilation;
};

Sizes vertical(const ConvShape& c) { return {c.height, c.out_height, c.kernel_h, c.stride_h, c.pad_h, c.dilation_h}; }
Sizes horizontal(const ConvShape& c) { return {c.width, c.out_width, c.kernel_w, c.stride_w, c.pad_w, c.dilation_w}; }

ConvAxis forward_axis(const Sizes& s, int64_t* offset) {
    for (int64_t k = 0; k < s.kernel; ++k) offset[k] = k * s.dilation - s.padding;
    return {s.out_size, s.stride, s.size, 1, 0, s.kernel, false, offset};
}

// Place `step * p + first` of dx takes part in the output positions q with step * q + k * dilation - padding equal to
// it: q = p + (first + padding - k * dilation) / step, for the taps k that divide.
ConvAxis phase_axis(const Sizes& s, int64_t first, int64_t* offset) {
    const int64_t step = s.stride;
    for (int64_t k = 0; k < s.kernel; ++k) {
        const int64_t distance = first + s.padding - k * s.dilation;
        offset[k] = distance % step == 0 ? distance / step : kAbsent;
    }
    const int64_t positions = first < s.size ? ceil_div(s.size - first, step) : 0;
    return {positions, 1, s.out_size, step, first, s.kernel, true, offset};
}

int64_t modulo(int64_t a, int64_t b) { return (a % b + b) % b; }

// Where the lanes of strip `strip` lie: place step_h * x + offset_h of each row of positions, and where the plane is
// flat of its row step_v * y + offset_v.
void locate(const ConvPanels& panels, int64_t strip, int64_t step_v, int64_t offset_v, int64_t limit_v, int64_t step_h,
            int64_t offset_h, int64_t limit_h, const ImageStrides& tensor, ConvLanes& lanes) {
    const int64_t width = panels.product.h.positions, height = panels.product.v.positions;
    int64_t q = strip * kVectorRow, x = q % width;
    int64_t y = panels.flat ? q / width % height : 0, n = panels.flat ? q / width / height : q / width;
    lanes.pieces = 0;
    for (int64_t l = 0; l < kVectorRow; ++l, ++q) {
        const int64_t column = step_h * x + offset_h;
        const int64_t row = !panels.flat ? 0 : offset_v == kAbsent ? -1 : step_v * y + offset_v;
        const bool inside = q < panels.plane && column >= 0 && column < limit_h && row >= 0 && row < limit_v;
        lanes.at[l] = inside ? n * tensor.n + row * tensor.h + column * tensor.w : -1;
        if (inside) {
            if (l > 0 && lanes.at[l - 1] >= 0 && lanes.at[l] == lanes.at[l - 1] + 1) {
                ++lanes.length[lanes.pieces - 1];
            } else {
                lanes.lane[lanes.pieces] = static_cast<int32_t>(l);
                lanes.length[lanes.pieces++] = 1;
            }
        }
        if (++x < width) continue;
        x = 0;
        if (panels.flat && ++y < height) continue;
        y = 0;
        ++n;
    }
}

}  // namespace

ConvProduct conv_forward(const ConvShape& shape, int64_t* offsets) {
    return {shape.batch, forward_axis(vertical(shape), offsets),
            forward_axis(horizontal(shape), offsets + shape.kernel_h)};
}

int64_t conv_phases(const ConvShape& shape) { return shape.stride_h * shape.stride_w; }

ConvProduct conv_phase(const ConvShape& shape, int64_t phase, int64_t* offsets) {
    return {shape.batch, phase_axis(vertical(shape), phase / shape.stride_w, offsets),
            phase_axis(horizontal(shape), phase % shape.stride_w, offsets + shape.kernel_h)};
}

ConvPanels::ConvPanels(const ConvProduct& product, int64_t threads) : product(product) {
    flat = product.v.kernel == 1;
    plane = product.batch * product.h.positions * (flat ? product.v.positions : 1);
    strips = ceil_div(plane, kVectorRow);
    // The height that leaves the fewest rows empty and no thread idle. A low panel costs more per row: each nonzero is
    // decoded for fewer multiply-adds. One of eight rows pays where they are shared (see ConvTiling).
    height = 0;
    int64_t best = 0;
    for (const int64_t h : {8, 4, 2, 1}) {
        const int64_t panels = flat ? ceil_div(strips, h) : strips * ceil_div(product.v.positions, h);
        const int64_t cost = ceil_div(panels, threads) * (h + 1);
        if ((flat && h == 8) || (height != 0 && cost >= best)) continue;
        best = cost;
        height = h;
    }
    blocks = flat ? 1 : ceil_div(product.v.positions, height);
    count = flat ? ceil_div(strips, height) : strips * blocks;
}

int64_t ConvPanels::live(int64_t panel) const {
    return flat ? std::min(height, strips - strip(panel)) : std::min(height, product.v.positions - top(panel));
}

ConvGroup conv_group(const ConvPanels& panels, const ConvTiling& tiling, int64_t group, ConvTap* taps,
                     ConvSource* sources) {
    const ConvAxis &v = panels.product.v, &h = panels.product.h;
    const int64_t height = panels.height;
    int64_t count = 0, rows = 0;
    for (int64_t column = 0; column < h.kernel; ++column) {
        if (h.offset[column] == kAbsent) continue;
        // Rows of one class modulo the step overlap; a stretch of them begins at its lowest.
        for (int64_t part = 0; part < v.step; ++part) {
            int64_t begin = 0, base = kAbsent;  // of the latest stretch of rows
            for (int64_t i = 0; i < v.kernel; ++i) {
                const int64_t k = v.falling ? v.kernel - 1 - i : i, tap = k * h.kernel + column, offset = v.offset[k];
                if (tiling.group(tap) != group || offset == kAbsent || modulo(offset, v.step) != part) continue;
                if (panels.flat || base == kAbsent || (offset - base) / v.step > rows - begin) {
                    begin = rows;
                    base = offset;
                }
                const int64_t at = begin + (offset - base) / v.step;
                for (; rows < at + height; ++rows) {
                    const int64_t place = panels.flat ? rows - begin : base + (rows - begin) * v.step;
                    sources[rows] = {static_cast<int32_t>(column), static_cast<int32_t>(place)};
                }
                taps[count++] = {static_cast<int32_t>(tap), static_cast<int32_t>(group), static_cast<int32_t>(at), 0};
            }
        }
    }
    for (int64_t i = 0; i < count; ++i) taps[i].scale = static_cast<int32_t>(rows);
    return {count, rows};
}

void conv_lanes(const ConvPanels& panels, int64_t panel, const ImageStrides& from, const ImageStrides& to,
                ConvLanes* lanes) {
    const ConvAxis &v = panels.product.v, &h = panels.product.h;
    const int64_t each = panels.lanes(), strip = panels.strip(panel);
    for (int64_t column = 0; column < h.kernel; ++column)
        for (int64_t i = 0; i < each && h.offset[column] != kAbsent; ++i)
            locate(panels, strip + i, v.step, v.offset[0], v.input, h.step, h.offset[column], h.input, from,
                   lanes[column * each + i]);
    for (int64_t i = 0; i < each; ++i)
        locate(panels, strip + i, v.write_step, v.write_first, INT64_MAX, h.write_step, h.write_first, INT64_MAX, to,
               lanes[h.kernel * each + i]);
}

void conv_read_rows(const ConvPanels& panels, int64_t panel, const ImageStrides& from, const ConvGroup& group,
                    const ConvSource* sources, const ConvLanes* lanes, int64_t at, ConvVectorRow* rows) {
    const ConvAxis& v = panels.product.v;
    const int64_t step = group.rows * kVectorRow;
    for (int64_t j = 0; j < group.rows; ++j, at += kVectorRow) {
        const ConvSource source = sources[j];
        if (panels.flat) {
            rows[j] = {lanes + source.column * panels.height + source.place, 0, at, step};
            continue;
        }
        const int64_t y = v.step * panels.top(panel) + source.place;
        rows[j] = {lanes + source.column, y >= 0 && y < v.input ? y * from.h : -1, at, step};
    }
}

void conv_write_rows(const ConvPanels& panels, int64_t panel, const ImageStrides& to, const ConvLanes* lanes,
                     ConvVectorRow* rows) {
    const ConvAxis& v = panels.product.v;
    const int64_t step = panels.height * kVectorRow;
    lanes += panels.product.h.kernel * panels.lanes();
    for (int64_t j = 0; j < panels.height; ++j) {
        const int64_t y = panels.flat ? 0 : v.write_step * (panels.top(panel) + j) + v.write_first;
        rows[j] = {panels.flat ? lanes + j : lanes, j < panels.live(panel) ? y * to.h : -1, j * kVectorRow, step};
    }
}

}  // namespace sk
