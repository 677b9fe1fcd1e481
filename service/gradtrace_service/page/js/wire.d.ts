// The shapes of requests and answers, for the type checker alone; docs/api.md describes them.

export type Split = "train" | "query";
export type Payload = {
  image?: string;
  text?: string;
  features?: Record<string, number | string | null>;
  error?: string;
  token_ids?: number[];
  label?: number | string;
  [other: string]: unknown;
};
export type Feature = {
  name: string;
  min: number | null;
  max: number | null;
  median: number | null;
  integer: boolean;
  choices: string[] | null;
};
export type Input =
  | { kind: "image"; height: number; width: number; channels: number }
  | { kind: "text" }
  | { kind: "features"; features: Feature[] }
  | { kind: "other" };

export type Checkpoint = { name: string; step: number; learning_rate: number; run: number; kind: string };
export type IndexInfo = {
  generation: number;
  task: string;
  rows: number;
  deleted?: number;
  checkpoints: Checkpoint[];
  dimensions: number;
  basis: string;
  precision: string;
  verified: boolean;
};
export type IndexDetails = IndexInfo & {
  methods: string[];
  class_names: string[] | null;
  query_rows: number;
  conventions: Record<string, string>;
  splits?: Record<Split, number>;
  input?: Input | null;
  columns?: string[];
  layers?: string[];
  token_methods?: string[];
  can_retrain?: boolean;
  can_complete?: boolean;
};
export type TokenShares = { scores: number[]; elsewhere: number };
export type RowTokens = { row: number; score: number; tokens: string[]; training: TokenShares; query: TokenShares };
export type TokensAnswer = { query_tokens: string[]; results: RowTokens[] };
export type IndexSummary = {
  name: string | null;
  generation: number | null;
  task: string | null;
  rows: number | null;
  deleted?: number | null;
  loaded: boolean | null;
  opening_seconds: number | null;
};
export type Who = {
  name: string | null;
  scopes: string[];
  keys_required: boolean;
  read_only: boolean;
  started?: string;
};

export type Judged = {
  label: number | null;
  label_name: string | null;
  prediction: number | null;
  prediction_name: string | null;
  loss: number | null;
  correct?: boolean | null;
};
export type Example = Judged & { split: Split; row: number; example: Payload | null };
export type ExampleList = {
  split: Split;
  rows_total: number;
  results: Example[];
  pending?: number;
  note?: string | null;
};
export type Hit = Judged & {
  row: number;
  score: number;
  parts: Record<string, number> | null;
  layers?: Record<string, number> | null;
  percentile?: number | null;
  cluster?: number | null;
  example: Payload | null;
};
export type Probability = { label: number; label_name: string | null; probability: number };
export type QueryInfo = Judged & {
  split: Split | null;
  row: number | null;
  rows: number[] | null;
  count: number;
  target: string;
  example: Payload | null;
  probabilities?: Probability[] | null;
};
export type Histogram = { edges: number[]; counts: number[] };
export type Distribution = {
  mean: number;
  std: number;
  quantiles: Record<string, number>;
  histogram?: Histogram | null;
};
export type Influence = {
  query: QueryInfo;
  proponents: Hit[];
  opponents: Hit[];
  rows_searched: number;
  rows_touched: number;
  rows_rescored: number;
  distribution: Distribution | null;
  note: string | null;
};
export type Completion = {
  text: string;
  tokens: string[];
  payload: Payload;
  ended: "end" | "length" | "time";
};
export type InfluenceAnswer = {
  index: IndexInfo;
  method: string;
  convention: string;
  exact: boolean;
  recall: { top: number; bottom: number } | null;
  rescored: boolean;
  results: Influence[];
  timing_ms: Record<string, number>;
};
export type Group = {
  group: number | boolean | string | null;
  group_name: string | null;
  bounds: [number, number] | null;
  rows: number;
  sum: number;
  mean: number;
};
export type GroupsAnswer = { by: string; results: { groups: Group[] }[] };

export type Mark = {
  row: number;
  mark: "wrong" | "right" | "unsure" | "remove";
  label: number | null;
  label_name: string | null;
  note: string | null;
  who: string | null;
  when: string;
  version: number;
};
export type MarksAnswer = { rows_total: number; counts: Record<string, number>; results: Mark[] };
export type SavedQuestion = {
  id: number;
  title: string;
  address: string;
  note: string | null;
  who: string | null;
  when: string;
};
export type SavedQuestions = { total: number; results: SavedQuestion[] };
export type RetrainPrediction = {
  method: string;
  score_sums: number[];
  predicted_changes: number[] | null;
  predicted_change: number | null;
  spearman: number | null;
};
export type RetrainResult = {
  rows: number;
  removed: number;
  seed: number;
  split: Split;
  queries: number[];
  measurement: string;
  before: number[];
  after: number[];
  measured: [number, number];
  measured_change: number;
  accuracy: [number, number] | null;
  method: string | null;
  predicted_change: number | null;
  predictions: RetrainPrediction[];
};
export type Job = {
  id: string;
  index: string;
  operation: string;
  roll_back_to: number | null;
  rows?: number | null;
  who?: string | null;
  state: "running" | "succeeded" | "failed" | "interrupted";
  progress: number;
  generation: number;
  attempts: number;
  interruptions?: number;
  error: string | null;
  lost_methods: Record<string, string>;
  created: string;
  ended: string | null;
  result?: RetrainResult | null;
};
export type Generation = {
  generation: number;
  created: string | null;
  rows: number | null;
  checkpoints: number | null;
  current: boolean;
  reason: string | null;
  problem: string | null;
};
export type RemovalTerms = { loss: number; score_sum: number; predicted_change: number | null };
export type Asked = { split: Split | null; row: number | null; label: number | null; label_name: string | null };
export type RemovalAnswer = {
  method: string;
  convention: string;
  rows: number;
  results: (RemovalTerms & { query: Asked; target: string })[];
  mean: RemovalTerms;
};
export type ColumnsAnswer = {
  rows: number[];
  columns: Record<string, (number | boolean | string | null)[]>;
  rows_total: number;
  sampled: boolean;
  pending?: number;
};
export type OverviewAnswer = {
  index: IndexInfo;
  labels: { label: number; label_name: string | null; rows: number; correct: number | null; mean_loss: number | null }[];
  loss_by_checkpoint: { name: string; step: number; run: number; mean_loss: number | null }[];
  loss_histogram: Histogram | null;
  coordinates: [string, string] | null;
  pending?: number;
};
export type SelfInfluenceAnswer = { method: string; convention: string; rows_total: number; results: Hit[] };
export type ComparisonHead = { method: string; convention: string; index?: IndexInfo; exact?: boolean; results?: Influence[] };
