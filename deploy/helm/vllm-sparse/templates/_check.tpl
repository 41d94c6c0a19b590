{{/* Refuses settings that each are allowed, but not together. Takes a server. */}}
{{- define "vllm-sparse.check" -}}
{{- $at := printf "models.%s" .name -}}
{{- $model := .model -}}
{{- if eq (empty $model.source.hub) (empty $model.source.claim) -}}
{{- fail (printf "%s.source: hub is %q and claim is %q; set one of them: the name of a model on the hub, or an existing claim that holds the model" $at $model.source.hub $model.source.claim) -}}
{{- end -}}
{{- if and (eq $model.cache.kind "existingClaim") (not $model.cache.existingClaim) -}}
{{- fail (printf "%s.cache: kind is existingClaim and existingClaim is empty; name a claim, or use newClaim or emptyDir" $at) -}}
{{- end -}}
{{- if and (gt (int $model.nodes) 1) (lt (int $model.accelerator.count) 1) -}}
{{- fail (printf "%s.nodes is %d with accelerator.count 0; several nodes serve a model together only with accelerators" $at (int $model.nodes)) -}}
{{- end -}}
{{- if and (eq (int $model.rollout.maxSurge) 0) (eq (int $model.rollout.maxUnavailable) 0) -}}
{{- fail (printf "%s.rollout: maxSurge and maxUnavailable are both 0, so no update could begin; set one to 1 or more" $at) -}}
{{- end -}}
{{- $autoscaling := $model.autoscaling -}}
{{- if and (ne $autoscaling.kind "none") (gt (int $autoscaling.minReplicas) (int $autoscaling.maxReplicas)) -}}
{{- fail (printf "%s.autoscaling: minReplicas is %d, more than maxReplicas %d" $at (int $autoscaling.minReplicas) (int $autoscaling.maxReplicas)) -}}
{{- end -}}
{{- if and (eq $autoscaling.kind "hpa") (lt (int $autoscaling.minReplicas) 1) -}}
{{- fail (printf "%s.autoscaling: minReplicas is 0, which only kind keda can do" $at) -}}
{{- end -}}
{{- if and (eq $autoscaling.kind "keda") (not $autoscaling.prometheus) -}}
{{- fail (printf "%s.autoscaling: kind is keda and prometheus is empty; give the URL of the Prometheus that scrapes the servers" $at) -}}
{{- end -}}
{{- if and $model.ingress.enabled (not $model.ingress.host) -}}
{{- fail (printf "%s.ingress: enabled without a host; give the host name that clients call" $at) -}}
{{- end -}}
{{- if and $model.httpRoute.enabled (not $model.httpRoute.parentRefs) -}}
{{- fail (printf "%s.httpRoute: enabled without parentRefs; name the gateway, as [{name: ...}]" $at) -}}
{{- end -}}
{{- $object := include "vllm-sparse.serverName" . -}}
{{- if gt (len $object) 52 -}}
{{- fail (printf "%s: the objects' name %q has %d characters, of which 52 are allowed; shorten the model's name or the release's, or set fullnameOverride" $at $object (len $object)) -}}
{{- end -}}
{{- $job := include "vllm-sparse.loadTestName" . -}}
{{- if and $model.loadTest.run (gt (len $job) 63) -}}
{{- fail (printf "%s.loadTest: the Job's name %q has %d characters, of which 63 are allowed; shorten run" $at $job (len $job)) -}}
{{- end -}}
{{- /* vLLM reads _ as -, and an argument can be read by whoever may list pods. */}}
{{- range $model.extraArgs -}}
{{- $argument := . | splitList "=" | first | replace "_" "-" -}}
{{- with get (include "vllm-sparse.settingsOfArguments" $ | fromYaml) $argument -}}
{{- fail (printf "%s.extraArgs: %s is not allowed; set %s.%s instead" $at $argument $at .) -}}
{{- end -}}
{{- end -}}
{{- range $variable, $setting := dict "VLLM_API_KEY" "apiKey" "HF_TOKEN" "hubToken" "HUGGING_FACE_HUB_TOKEN" "hubToken" -}}
{{- if get $model.env $variable -}}
{{- fail (printf "%s.env: %s is not allowed, since values are no place for secrets; set %s.%s.existingSecret instead" $at $variable $at $setting) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Arguments of vllm serve that have a setting of their own. */}}
{{- define "vllm-sparse.settingsOfArguments" -}}
--additional-config: sparse or additionalConfig
--api-key: apiKey
--attention-backend: sparse
--dtype: engine.dtype
--gpu-memory-utilization: engine.gpuMemoryUtilization
--headless: nodes
--hf-token: hubToken
--master-addr: nodes
--max-model-len: engine.maxModelLen
--max-num-batched-tokens: engine.maxNumBatchedTokens
--max-num-seqs: engine.maxNumSeqs
--nnodes: nodes
--node-rank: nodes
--otlp-traces-endpoint: tracing.endpoint
--port: service.port
--revision: source.revision
--served-model-name: servedNames
--shutdown-timeout: drain.requestSeconds
--tensor-parallel-size: accelerator.count
{{- end }}
