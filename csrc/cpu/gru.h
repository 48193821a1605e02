// The fused sparse GRU on CPUs: what the launchers (gru.cpp), the packing (gru_pack.cpp) and the kernels of each
// instruction set (kernels/gru.cpp) share.
//
// Vector lanes are sequences. The batch is sorted by length and cut into tiles of kGruLanes sequences; a tile runs as
// long as its longest one, and (direction, tile) is the unit of parallel work, so no step waits for another thread.
// Inside a tile a matrix is a *panel*: one row per feature, a float per sequence for each time step of a chunk of
// steps,
//
//     panel[feature * stride + step * kGruLanes + lane]
//
// and a weight is one scalar broadcast against whole panel rows. Step s of a sequence of length n is time s forwards
// and time n - 1 - s backwards: a direction only changes how rows of x and y are addressed.
#pragma once

#include <cstddef>
#include <cstdint>

#include "api.h"

namespace sk {

// A packed weight (or its transpose) as strips of `side` consecutive output rows; each entry is one input row of the
// panel and the `side` scalars that multiply it. With side 1 a strip is a bundle of 4 rows of about equal length,
// chosen anywhere: entries have 4 offsets and 4 scalars, and shorter rows are filled up with the panel's zero row.
struct GruStrips {
    int64_t side, count;
    int32_t* ptr;      // [count + 1] entries
    int32_t* src;      // [entries] or [entries, 4]: first float of the input row in its panel
    int32_t* rows;     // [count, 4] output rows of a bundle; unused otherwise
    float* weight;     // [entries, side] or [entries, 4]
    float* bias;       // by output row, padded; zero for a transposed weight
    int32_t* scratch;  // [inputs + 2] for sorting the rows of bundles
};

// How a weight gradient is computed and accumulated.
//   kOuter: tiles of `side` rows x 16 consecutive columns, outer products of dgates and rows of x, lanes = columns
//   kQuad4: 4 rows x 4 columns anywhere; kQuad1: 4 quads of 1 row x 4 columns: dot products, lanes = sequences
enum class GruGradKind : int { kOuter, kQuad4, kQuad1 };

struct GruTiles {
    GruGradKind kind;
    int64_t side, count;  // rows of a tile or quad; strips (kOuter) or quads
    int32_t* ptr;         // kOuter: [count + 1] tiles of a strip of rows
    int32_t* row;         // kOuter: [count], else [quads]: first float of the first gate row in the dgates panel
    int32_t* col;         // kOuter: [tiles] first column; else [quads, 4] first float of the input row in its panel
    int64_t floats;       // of the accumulator: tiles * side * 16 or quads * (side 4 ? 16 : 4)
};

// Sequences of a tile: whole vectors of every instruction set, and few enough that sorting by length leaves little to
// idle lanes.
inline constexpr int64_t kGruLanes = 16;

// Sizes derived from a layer, the same in forward and backward.
struct GruGeometry {
    int64_t tiles;                   // ceil(batch / lanes)
    int64_t chunk;                   // steps of a chunk
    int64_t wide;                    // kGruLanes * chunk: floats of a row of a chunk's panel
    int64_t rows_x, rows_h, rows_g;  // rows of the panels of x, of h and of all gates, padded: at least one spare, zero
    int64_t n_shift;                 // gate row g >= 2H of W_ih is row g + n_shift of the dgates panel ...
    int64_t ih_base;                 // ... and gate row g < 2H is row g + ih_base
    int64_t rows_dg;                 // rows of the dgates panel
};

// One direction's packed weights: [0] ih, [1] hh.
struct GruDirection {
    GruStrips forward[2];     // over the rows of x and of h
    GruStrips transposed[2];  // over the rows of dgates
    GruTiles tiles[2];
};

// One thread's scratch; take_forward() and take_backward() in gru.cpp give the sizes.
struct GruScratch {
    float *x, *gates_x, *gates_h, *h, *zeros;  // forward
    float *dgates, *dx, *dy, *h_prev, *dh;     // backward
    float *x_rows, *h_rows;                    // [wide, rows_x] and [wide, rows_h]: rows for kOuter
    float* grads[2][2];                        // [direction][weight]: accumulators of GruTiles
    float* bias[2];                            // [direction]: [rows_dg, 16] partial sums, in the first VLEN
};

struct GruRun {
    const GruLayer* layer;
    const GruBackward* grad;  // null in the forward
    float *y, *h_n;           // of the forward
    GruGeometry geometry;
    const int32_t* order;   // [batch] sequences by falling length
    const int32_t* length;  // [batch] their lengths
    GruDirection direction[2];
    float* dx_second;  // [batch, steps, in]: where direction 1 puts dx when it runs beside direction 0, or null
};

struct GruTable {
    void (*forward)(const GruRun& run, int64_t direction, int64_t tile, const GruScratch& scratch);
    void (*backward)(const GruRun& run, int64_t direction, int64_t tile, const GruScratch& scratch);
};

// Carves aligned arrays from a workspace; with a null base it only measures.
struct GruArena {
    char* base;
    size_t used = 0;

    template <class T>
    T* take(int64_t n) {
        const size_t at = used;
        used += (static_cast<size_t>(n) * sizeof(T) + 63) / 64 * 64;
        return base ? reinterpret_cast<T*>(base + at) : nullptr;
    }
};

// gru_pack.cpp. Sizes come from shapes and nnzb alone, so that the workspace does not depend on the topology.
GruStrips gru_take_strips(GruArena& arena, const GruWeight& w, bool transposed);
void gru_pack_strips(GruStrips& strips, const GruWeight& w, bool transposed, const GruGeometry& g, bool recurrent);
GruTiles gru_take_tiles(GruArena& arena, const GruWeight& w);
void gru_pack_tiles(GruTiles& tiles, const GruWeight& w, const GruGeometry& g, bool recurrent);
// Sums the accumulators of all threads, `parts[thread]`, in order into the gradient of the values.
void gru_unpack_tiles(const GruTiles& tiles, const GruWeight& w, const float* const* parts, int64_t threads);

}  // namespace sk
