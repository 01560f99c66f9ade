// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

/// @notice What a NodeRegistry is deployed with. Fixed for its life.
struct RegistryTerms {
    /// Wei an account must keep to serve.
    uint128 minimumStake;
    /// Seconds from registration until a node may serve, and from a top-up until it counts for draws. At least 1.
    uint64 activationDelay;
    /// Seconds from a thaw or an exit until the stake can be taken out.
    uint64 thawPeriod;
}

/// @notice What an InferenceEscrow is deployed with. Fixed for its life.
struct EscrowTerms {
    /// Shares of the charge in basis points; together at most 5000.
    uint16 protocolFeeBps;
    uint16 verifierShareBps;
    /// Seconds from the opening of a request until it must be routed.
    uint64 routeWindow;
    /// Seconds from the route until all stages must have committed.
    uint64 commitWindow;
    /// Seconds from the last commitment until the request must be settled; no shorter than OutputVerification.longestDispute().
    uint64 verificationWindow;
    /// Upper bound of the prompt and of the answer of one request, each.
    uint32 maximumTokens;
}

/// @notice What an OutputVerification is deployed with. Fixed for its life.
struct VerificationTerms {
    /// Share of the requests before a first committee, in basis points.
    uint16 samplingRateBps;
    /// Seats of a first committee per stage, on average; doubles every round.
    uint16 committeeSeats;
    /// Reveals below which a committee cannot decide. At least 1.
    uint16 minimumReveals;
    /// Tau, in units of the circular L1 distance of two sketches (0 to 4096); at most 1024.
    uint16 tolerance;
    /// Seconds that the requester has to add its secret to the entropy of the draw.
    uint64 secretWindow;
    uint64 attestWindow;
    uint64 revealWindow;
    uint64 challengeWindow;
    /// Seconds that a node is kept out of new duties after a fault that is not an equivocation.
    uint64 jailPeriod;
    /// Wei a challenger puts down.
    uint128 challengeBond;
    /// Share of the stake taken for a wrong output or attestation, in basis points.
    uint16 incorrectSlashBps;
    /// Share of the stake taken for keeping back a reveal or evidence, in basis points.
    uint16 withholdSlashBps;
    /// Shares of a slash for the members who proved it and for the challenger or reporter, in basis points; together at most
    /// 5000. The rest is burned.
    uint16 memberShareBps;
    uint16 reporterShareBps;
}

/// @notice What a RequestTabs is deployed with. Fixed for its life.
struct TabTerms {
    /// Seconds from the post of a batch that the requesters have to add their secrets to the entropy of its draw. Far less than 256
    /// blocks take, so that there is time to draw before the block hash is out of reach.
    uint64 secretWindow;
    /// Seconds from the post of a batch until it must be drawn; longer than secretWindow.
    uint64 drawWindow;
    /// Seconds from the draw until the drawn leaves must be opened, and in which any other leaf can be challenged.
    uint64 openingWindow;
    /// Seconds from the closing of a tab until its money can be taken out; longer than drawWindow + openingWindow.
    uint64 closePeriod;
    /// A batch of T tokens has ceil(T / tokensPerDraw) draws, at most 32.
    uint32 tokensPerDraw;
    /// Wei that a challenger of a leaf puts down.
    uint128 challengeBond;
}
