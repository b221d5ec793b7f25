// The preference losses of one pair and their derivatives: fp32 on a GPU, fp64 on the CPU, where they cost
// nothing. The formulas with their sources: strop/ops/preference.py. c and d are the policy's log-ratios to the
// reference (of simpo and orpo its log-probs), h = c - d.
#pragma once
#include <math.h>

#include "strop_ops.h"

#ifdef __CUDACC__
#define STROP_ANYWHERE __host__ __device__ inline
#else
#define STROP_ANYWHERE inline
#endif

template <class Real>
struct PairLoss {
    Real loss, by_chosen, by_rejected;
};

// What strop_dpo_loss takes: STROP_OK or STROP_EKIND.
inline int check_kind(int kind, float beta, float label_smoothing) {
    const bool in_range = beta > 0.0f && beta < HUGE_VALF && label_smoothing >= 0.0f && label_smoothing < 0.5f;
    if (kind < STROP_SIGMOID || kind > STROP_ORPO || !in_range) return STROP_EKIND;
    return kind == STROP_EXO_PAIR && label_smoothing == 0.0f ? STROP_EKIND : STROP_OK;
}

template <class Real>
STROP_ANYWHERE Real sigmoid(Real x) {
    const Real small = exp(-fabs(x));  // no overflow on either side
    return (x >= Real(0) ? Real(1) : small) / (Real(1) + small);
}

template <class Real>
STROP_ANYWHERE Real log_sigmoid(Real x) {
    return fmin(x, Real(0)) - log1p(exp(-fabs(x)));
}

// A mean log-prob nearer to 0 than this, where fp32 has only noise to tell, counts as this: the odds of 0 would be
// infinite.
#define STROP_CERTAIN (-1e-6f)

template <class Real>
STROP_ANYWHERE Real log_odds(Real x) {
    x = fmin(x, Real(STROP_CERTAIN));
    return x - log(-expm1(x));
}

template <class Real>
STROP_ANYWHERE Real log_odds_slope(Real x) {
    return x > Real(STROP_CERTAIN) ? Real(0) : Real(-1) / expm1(x);
}

// A loss of h alone, from its derivative by beta * h.
template <class Real>
STROP_ANYWHERE PairLoss<Real> of_margin(Real loss, Real slope, Real beta) {
    return {loss, beta * slope, -beta * slope};
}

template <class Real>
STROP_ANYWHERE PairLoss<Real> pair_loss(int kind, Real c, Real d, Real beta, Real eps, Real delta) {
    const Real h = c - d, a = beta * h, one = 1, half = Real(0.5);
    const Real up = sigmoid(a), down = sigmoid(-a);
    switch (kind) {
        case STROP_SIGMOID:
        case STROP_SIGMOID_NORM:
            return of_margin(-(one - eps) * log_sigmoid(a) - eps * log_sigmoid(-a),
                             -(one - eps) * down + eps * up, beta);
        case STROP_SIMPO: {
            const Real off = a - delta;
            return of_margin(-(one - eps) * log_sigmoid(off) - eps * log_sigmoid(-off),
                             -(one - eps) * sigmoid(-off) + eps * sigmoid(off), beta);
        }
        case STROP_ORPO: {
            const Real ratio = log_odds(c) - log_odds(d), slope = beta * sigmoid(-ratio);
            return {-beta * log_sigmoid(ratio), -slope * log_odds_slope(c), slope * log_odds_slope(d)};
        }
        case STROP_ROBUST: {
            const Real scale = one / (one - 2 * eps);
            return of_margin(scale * (-(one - eps) * log_sigmoid(a) + eps * log_sigmoid(-a)),
                             scale * (-(one - eps) * down - eps * up), beta);
        }
        case STROP_HINGE:
            return of_margin(a >= one ? Real(0) : one - a, a < one ? -one : Real(0), beta);
        case STROP_IPO: {
            const Real off = h - half / beta;
            return of_margin(off * off, 2 * off, one);
        }
        case STROP_EXO_PAIR: {
            const Real win = log(one - eps), lose = log(eps);
            return of_margin(up * (log_sigmoid(a) - win) + down * (log_sigmoid(-a) - lose),
                             up * down * (a - win + lose), beta);
        }
        case STROP_NCA_PAIR:
            return {-log_sigmoid(beta * c) - half * log_sigmoid(-beta * c) - half * log_sigmoid(-beta * d),
                    beta * (half * sigmoid(beta * c) - sigmoid(-beta * c)), beta * half * sigmoid(beta * d)};
        case STROP_BCO_PAIR:
            return {-log_sigmoid(beta * c - delta) - log_sigmoid(delta - beta * d),
                    -beta * sigmoid(delta - beta * c), beta * sigmoid(beta * d - delta)};
        case STROP_SPPO_HARD: {
            const Real won = c - half / beta, lost = d + half / beta;
            return {won * won + lost * lost, 2 * won, 2 * lost};
        }
        case STROP_APO_ZERO:
            return {sigmoid(-beta * c) + sigmoid(beta * d), -beta * sigmoid(beta * c) * sigmoid(-beta * c),
                    beta * sigmoid(beta * d) * sigmoid(-beta * d)};
        case STROP_APO_DOWN: {
            const Real margin = beta * up * down;
            return {sigmoid(beta * c) + down, beta * sigmoid(beta * c) * sigmoid(-beta * c) - margin, margin};
        }
    }
    return {Real(NAN), Real(NAN), Real(NAN)};  // of no kind: the host side has refused it
}
