// The preference losses of one pair and their derivatives, for every compiler. The formulas are those of the
// fp64 oracles in the tests; c and d are the policy's log-ratios to the reference, h = c - d.
#pragma once
#include <math.h>

#include "strop_ops.h"

#ifdef __CUDACC__
#define STROP_ANYWHERE __host__ __device__ static inline
#else
#define STROP_ANYWHERE static inline
#endif

typedef struct {
    float loss, by_chosen, by_rejected;
} strop_pair_loss;

STROP_ANYWHERE float strop_sigmoid(float x) {
    const float small = expf(-fabsf(x));  // no overflow on either side
    return (x >= 0.0f ? 1.0f : small) / (1.0f + small);
}

STROP_ANYWHERE float strop_log_sigmoid(float x) { return fminf(x, 0.0f) - log1pf(expf(-fabsf(x))); }

// A loss of h alone, from its derivative by beta * h.
STROP_ANYWHERE strop_pair_loss strop_of_margin(float loss, float slope, float beta) {
    const strop_pair_loss result = {loss, beta * slope, -beta * slope};
    return result;
}

STROP_ANYWHERE strop_pair_loss strop_dpo_pair(int kind, float c, float d, float beta, float eps, float delta) {
    const float h = c - d, a = beta * h;
    const float up = strop_sigmoid(a), down = strop_sigmoid(-a);
    strop_pair_loss result = {NAN, NAN, NAN};
    switch (kind) {
        case STROP_SIGMOID:
        case STROP_SIGMOID_NORM:
            return strop_of_margin(-(1.0f - eps) * strop_log_sigmoid(a) - eps * strop_log_sigmoid(-a),
                                   -(1.0f - eps) * down + eps * up, beta);
        case STROP_ROBUST: {
            const float scale = 1.0f / (1.0f - 2.0f * eps);
            return strop_of_margin(
                scale * (-(1.0f - eps) * strop_log_sigmoid(a) + eps * strop_log_sigmoid(-a)),
                scale * (-(1.0f - eps) * down - eps * up), beta);
        }
        case STROP_HINGE:
            return strop_of_margin(a >= 1.0f ? 0.0f : 1.0f - a, a < 1.0f ? -1.0f : 0.0f, beta);
        case STROP_IPO: {
            const float off = h - 0.5f / beta;
            return strop_of_margin(off * off, 2.0f * off, 1.0f);
        }
        case STROP_EXO_PAIR: {
            const float win = logf(1.0f - eps), lose = logf(eps);
            return strop_of_margin(
                up * (strop_log_sigmoid(a) - win) + down * (strop_log_sigmoid(-a) - lose),
                up * down * (a - win + lose), beta);
        }
        case STROP_NCA_PAIR:
            result.loss = -strop_log_sigmoid(beta * c) - 0.5f * strop_log_sigmoid(-beta * c) -
                          0.5f * strop_log_sigmoid(-beta * d);
            result.by_chosen = beta * (0.5f * strop_sigmoid(beta * c) - strop_sigmoid(-beta * c));
            result.by_rejected = beta * 0.5f * strop_sigmoid(beta * d);
            return result;
        case STROP_BCO_PAIR:
            result.loss = -strop_log_sigmoid(beta * c - delta) - strop_log_sigmoid(delta - beta * d);
            result.by_chosen = -beta * strop_sigmoid(delta - beta * c);
            result.by_rejected = beta * strop_sigmoid(beta * d - delta);
            return result;
        case STROP_SPPO_HARD: {
            const float won = c - 0.5f / beta, lost = d + 0.5f / beta;
            result.loss = won * won + lost * lost;
            result.by_chosen = 2.0f * won;
            result.by_rejected = 2.0f * lost;
            return result;
        }
        case STROP_APO_ZERO:
            result.loss = strop_sigmoid(-beta * c) + strop_sigmoid(beta * d);
            result.by_chosen = -beta * strop_sigmoid(beta * c) * strop_sigmoid(-beta * c);
            result.by_rejected = beta * strop_sigmoid(beta * d) * strop_sigmoid(-beta * d);
            return result;
        case STROP_APO_DOWN:
            result.loss = strop_sigmoid(beta * c) + down;
            result.by_chosen = beta * (strop_sigmoid(beta * c) * strop_sigmoid(-beta * c) - up * down);
            result.by_rejected = beta * up * down;
            return result;
    }
    return result;
}
