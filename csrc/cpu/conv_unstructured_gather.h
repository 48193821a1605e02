// Unstructured convolution: which positions a product has, what each tap reads there, and how panels hold it.
#pragma once

#include "api.h"
#include "cpu/conv_unstructured.h"
#include "cpu/conv_unstructured_index.h"

namespace sk {

constexpr int64_t kAbsent = INT64_MIN;

// One axis of a product: position p reads input place step * p + offset[tap], zero where that is not in [0, input), and
// is written to place write_step * p + write_first. Taps with offset kAbsent take no part.
struct ConvAxis {
    int64_t positions, step, input, write_step, write_first, kernel;
    bool falling;  // offsets fall with the tap
    const int64_t* offset;
};

struct ConvProduct {
    int64_t batch;
    ConvAxis v, h;

    bool empty() const { return batch == 0 || v.positions == 0 || h.positions == 0; }
};

// The positions of y: x is read, y is written. offsets [kernel_h + kernel_w].
ConvProduct conv_forward(const ConvShape& shape, int64_t* offsets);

// The places of dx that are phase (modulo the strides): dy is read, dx is written.
int64_t conv_phases(const ConvShape& shape);
ConvProduct conv_phase(const ConvShape& shape, int64_t phase, int64_t* offsets);

// The cut of a product's positions into panels.
struct ConvPanels {
    ConvProduct product;
    bool flat;  // see conv_unstructured.h
    int64_t plane, strips, height, blocks, count;

    ConvPanels(const ConvProduct& product, int64_t threads);

    // Lanes that a panel has for each kernel column, and for writing.
    int64_t lanes() const { return flat ? height : 1; }
    int64_t strip(int64_t panel) const { return flat ? panel * height : panel % strips; }
    int64_t top(int64_t panel) const { return flat ? 0 : panel / strips * height; }
    // Vector rows of the panel that hold positions.
    int64_t live(int64_t panel) const;
};

// A vector row of a tile: the kernel column that it is shifted by, and its place: the input row for the panel's top at
// row 0, or where the plane is flat the vector row of the panel.
struct ConvSource {
    int32_t column, place;
};

// What the tiles of a group hold: `rows` vector rows a channel, for `taps` taps.
struct ConvGroup {
    int64_t taps, rows;
};

// Chooses the vector rows [at most group_taps * height] of a channel in the tiles of a group, and what each of its taps
// starts at. Taps of one kernel column whose rows overlap share them.
ConvGroup conv_group(const ConvPanels& panels, const ConvTiling& tiling, int64_t group, ConvTap* taps,
                     ConvSource* sources);

// The lanes of one panel: lanes()[kernel column][lanes()] for reading, then [lanes()] for writing.
void conv_lanes(const ConvPanels& panels, int64_t panel, const ImageStrides& from, const ImageStrides& to,
                ConvLanes* lanes);
// The vector rows of a tile that lies at `at` in the packed form, and those of a panel of outputs.
void conv_read_rows(const ConvPanels& panels, int64_t panel, const ImageStrides& from, const ConvGroup& group,
                    const ConvSource* sources, const ConvLanes* lanes, int64_t at, ConvVectorRow* rows);
void conv_write_rows(const ConvPanels& panels, int64_t panel, const ImageStrides& to, const ConvLanes* lanes,
                     ConvVectorRow* rows);

}  // namespace sk
