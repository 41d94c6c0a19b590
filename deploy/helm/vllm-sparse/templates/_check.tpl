{{/*
Refuses settings that each are allowed, but not together, and what the plugin would refuse at its start. Each message
names the place in the values and what to write instead. What depends on the plugin is in files/checks.json, which
deploy/helm/generate.py writes.
*/}}
{{- define "vllm-sparse.checkRelease" -}}
{{- $root := . -}}
{{- $doors := dict -}}
{{- $served := dict -}}
{{- include "vllm-sparse.checkLabels" (dict "at" "commonLabels" "labels" .Values.commonLabels) -}}
{{- range $name, $_ := .Values.models -}}
{{- $at := printf "models.%s" $name -}}
{{- $model := include "vllm-sparse.model" (dict "root" $root "name" $name) | fromJson -}}
{{- include "vllm-sparse.checkLabels" (dict "at" (printf "%s.podLabels" $at) "labels" $model.podLabels) -}}
{{- if $model.ingress.enabled -}}
{{- range $model.ingress.paths -}}
{{- $door := printf "path %s of host %q" . $model.ingress.host -}}
{{- with get $doors $door -}}
{{- fail (printf "%s.ingress: %s leads to models.%s already, so one of the two would get no requests; give each model a host of its own, or set router.enabled, which picks the model by a header" $at $door .) -}}
{{- end -}}
{{- $_ := set $doors $door $name -}}
{{- end -}}
{{- end -}}
{{- if $model.httpRoute.enabled -}}
{{- range $parent := $model.httpRoute.parentRefs -}}
{{- range default (list "*") $model.httpRoute.hostnames -}}
{{- $door := printf "host %q of gateway %s" . (list $parent.namespace $parent.name $parent.sectionName $parent.port | compact | join "/") -}}
{{- with get $doors $door -}}
{{- fail (printf "%s.httpRoute: %s leads to models.%s already, so one of the two would get no requests; give each model hostnames of its own, or set router.enabled, which picks the model by a header, and leave httpRoute out" $at $door .) -}}
{{- end -}}
{{- $_ := set $doors $door $name -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if $root.Values.router.enabled -}}
{{- range include "vllm-sparse.requestNames" (dict "name" $name "model" $model) | fromJsonArray -}}
{{- with get $served . -}}
{{- fail (printf "%s.servedNames: the router would find models.%s by the same name; give each model names of its own (servedNames, lora.adapters)" $at .) -}}
{{- end -}}
{{- $_ := set $served . $name -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if .Values.router.enabled -}}
{{- if not .Values.router.parentRefs -}}
{{- fail "router.parentRefs is empty; name the gateway, as [{name: ...}], or set router.enabled: false" -}}
{{- end -}}
{{- /* Gateway API's own limits. */}}
{{- if gt (len .Values.models) 16 -}}
{{- fail (printf "router: %d models, and a route has at most 16 rules; put the others into a release of their own" (len .Values.models)) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "vllm-sparse.checkLabels" -}}
{{- range list "app.kubernetes.io/name" "app.kubernetes.io/instance" "app.kubernetes.io/version" "app.kubernetes.io/managed-by" "app.kubernetes.io/component" "helm.sh/chart" "vllm-sparse/model" -}}
{{- if hasKey $.labels . -}}
{{- fail (printf "%s: %s is set by the chart, whose selectors need it; use another key, such as app.kubernetes.io/part-of (for the name: nameOverride)" $.at .) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Takes a server. */}}
{{- define "vllm-sparse.check" -}}
{{- $at := printf "models.%s" .name -}}
{{- $model := .model -}}
{{- include "vllm-sparse.checkSource" . -}}
{{- include "vllm-sparse.checkDevices" . -}}
{{- include "vllm-sparse.checkSparse" . -}}
{{- include "vllm-sparse.checkArguments" . -}}
{{- include "vllm-sparse.checkEnvironment" . -}}
{{- include "vllm-sparse.checkVolumes" . -}}
{{- if and (eq $model.cache.kind "existingClaim") (not $model.cache.existingClaim) -}}
{{- fail (printf "%s.cache: kind is existingClaim and existingClaim is empty; name a claim, or use newClaim or emptyDir" $at) -}}
{{- end -}}
{{- $none := list "0" "0%" -}}
{{- if and (has (toString $model.rollout.maxSurge) $none) (has (toString $model.rollout.maxUnavailable) $none) (eq $model.rollout.type "RollingUpdate") -}}
{{- fail (printf "%s.rollout: maxSurge and maxUnavailable are both 0, so no update could begin; set one to 1 or more" $at) -}}
{{- end -}}
{{- if and (eq $model.rollout.type "Recreate") (gt (int $model.nodes) 1) -}}
{{- fail (printf "%s.rollout.type is Recreate, which LeaderWorkerSet does not have; write RollingUpdate with maxUnavailable: 100%%" $at) -}}
{{- end -}}
{{- $autoscaling := $model.autoscaling -}}
{{- if and (ne $autoscaling.kind "none") (gt (int $autoscaling.minReplicas) (int $autoscaling.maxReplicas)) -}}
{{- fail (printf "%s.autoscaling: minReplicas is %d, more than maxReplicas %d; lower it, or raise maxReplicas" $at (int $autoscaling.minReplicas) (int $autoscaling.maxReplicas)) -}}
{{- end -}}
{{- if and (eq $autoscaling.kind "hpa") (lt (int $autoscaling.minReplicas) 1) -}}
{{- fail (printf "%s.autoscaling: minReplicas is 0, which only kind keda can do; write 1 or more, or kind: keda" $at) -}}
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
{{- if and (ne $model.service.type "LoadBalancer") (or $model.service.loadBalancerClass $model.service.loadBalancerSourceRanges) -}}
{{- fail (printf "%s.service: loadBalancerClass and loadBalancerSourceRanges are of type LoadBalancer, and type is %s; write type: LoadBalancer, or leave them out" $at $model.service.type) -}}
{{- end -}}
{{- if and $model.inferencePool.enabled (not $model.inferencePool.endpointPicker) -}}
{{- fail (printf "%s.inferencePool: enabled without an endpointPicker; name the service of the picker that you run for pool %q, or leave the pool out: routes then lead to the model's service" $at $object) -}}
{{- end -}}
{{- end }}

{{- define "vllm-sparse.checkSource" -}}
{{- $at := printf "models.%s.source" .name -}}
{{- $source := .model.source -}}
{{- $given := list -}}
{{- range list "hub" "claim" "hostPath" "image" "s3" -}}
{{- if get $source . -}}
{{- $given = append $given (printf "%s %q" . (get $source .)) -}}
{{- end -}}
{{- end -}}
{{- if ne (len $given) 1 -}}
{{- fail (printf "%s: %s; set one of hub (a name on the hub), claim (an existing claim that holds the model), hostPath, image and s3" $at (default "nothing names the model" ($given | join " and "))) -}}
{{- end -}}
{{- if and $source.path (or $source.hub $source.s3) -}}
{{- fail (printf "%s.path is %q, which is a folder in a claim, hostPath or image; leave it out, or write it as the end of s3" $at $source.path) -}}
{{- end -}}
{{- if and $source.revision (not $source.hub) -}}
{{- fail (printf "%s.revision is %q, and only the hub has revisions; leave it out" $at $source.revision) -}}
{{- end -}}
{{- if and $source.s3 (lt (int .model.accelerator.count) 1) -}}
{{- fail (printf "%s.s3 is read by a streamer that the CPU image does not have; copy the model into a claim and name that, or serve it on GPUs" $at) -}}
{{- end -}}
{{- if and $source.image (semverCompare "<1.33.0-0" .root.Capabilities.KubeVersion.Version) -}}
{{- fail (printf "%s.image needs Kubernetes 1.33, which mounts images, and this is %s; copy the model into a claim and name that" $at .root.Capabilities.KubeVersion.Version) -}}
{{- end -}}
{{- range $adapter, $place := .model.lora.adapters -}}
{{- if and (not $source.hub) (not (hasPrefix "/" $place)) -}}
{{- fail (printf "models.%s.lora.adapters.%s is %q, a name on the hub, which a server asks nothing whose model is not from there; write a folder of the container, such as /models/%s" $.name $adapter $place $adapter) -}}
{{- end -}}
{{- if has $adapter (include "vllm-sparse.servedNames" $ | fromJsonArray) -}}
{{- fail (printf "models.%s.lora.adapters.%s has a name of the model itself (servedNames); rename one of the two" $.name $adapter) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "vllm-sparse.checkDevices" -}}
{{- $at := printf "models.%s" .name -}}
{{- $accelerator := .model.accelerator -}}
{{- $nodes := int .model.nodes -}}
{{- $tensor := int .model.parallelism.tensor -}}
{{- $pipeline := int .model.parallelism.pipeline -}}
{{- $data := int .model.parallelism.data -}}
{{- $devices := mul (int $accelerator.count) $nodes | int -}}
{{- if and (gt $nodes 1) (lt (int $accelerator.count) 1) -}}
{{- fail (printf "%s.nodes is %d with accelerator.count 0; several nodes serve a model together only with accelerators: write nodes: 1, or accelerator.count: 1 or more" $at $nodes) -}}
{{- end -}}
{{- if eq $devices 0 -}}
{{- if or (gt $tensor 1) (gt $pipeline 1) (gt $data 1) -}}
{{- fail (printf "%s.parallelism: tensor is %d, pipeline is %d and data is %d with accelerator.count 0, which serves in one process; leave parallelism out, and raise replicas for more servers" $at $tensor $pipeline $data) -}}
{{- end -}}
{{- else -}}
{{- if gt (mod $devices $data) 0 -}}
{{- fail (printf "%s.parallelism.data is %d, which does not divide accelerator.count %d x nodes %d = %d devices; write a divisor of %d" $at $data (int $accelerator.count) $nodes $devices $devices) -}}
{{- end -}}
{{- $each := div $devices $data -}}
{{- if gt (mod $each $pipeline) 0 -}}
{{- fail (printf "%s.parallelism.pipeline is %d, which does not divide the %d devices of a copy; write a divisor of %d" $at $pipeline $each $each) -}}
{{- end -}}
{{- if and $tensor (ne (mul $tensor $pipeline $data | int) $devices) -}}
{{- fail (printf "%s.parallelism: tensor %d x pipeline %d x data %d = %d, and accelerator.count %d x nodes %d = %d devices; write tensor: %d (or 0, which takes what the others leave), or as many devices" $at $tensor $pipeline $data (mul $tensor $pipeline $data) (int $accelerator.count) $nodes $devices (div $each $pipeline)) -}}
{{- end -}}
{{- if and (gt $nodes 1) (gt $data 1) (gt (mod (int $accelerator.count) $each) 0) -}}
{{- fail (printf "%s.parallelism: a copy of %d devices spans nodes of accelerator.count %d, and data is %d; write data: 1 and raise replicas, each of which is a group of nodes of its own" $at $each (int $accelerator.count) $data) -}}
{{- end -}}
{{- end -}}
{{- if and $accelerator.claims (semverCompare "<1.34.0-0" .root.Capabilities.KubeVersion.Version) -}}
{{- fail (printf "%s.accelerator.claims needs Kubernetes 1.34, and this is %s; leave it out and name the device plugin's accelerator.resource" $at .root.Capabilities.KubeVersion.Version) -}}
{{- end -}}
{{- if and $accelerator.claims (eq $devices 0) -}}
{{- fail (printf "%s.accelerator: claims bring devices, and count is 0; write in count how many they bring to a pod" $at) -}}
{{- end -}}
{{- end }}

{{/* Methods that the default preset needs, and those that the server enables. */}}
{{- define "vllm-sparse.methods" -}}
{{- $sparse := .model.sparse -}}
{{- $checks := .root.Files.Get "files/checks.json" | fromJson -}}
{{- $preset := default "dense" $sparse.preset -}}
{{- $needed := list -}}
{{- range $phase := list "prefill" "decode" -}}
{{- if and (not (get $sparse $phase)) (ne $preset "dense") -}}
{{- $needed = concat $needed (get (get $checks.presets $preset) $phase) -}}
{{- end -}}
{{- end -}}
{{- $enabled := ternary $sparse.methods (concat $checks.enabled $needed) (hasKey $sparse "methods") -}}
{{- dict "needed" $needed "enabled" $enabled | toJson -}}
{{- end }}

{{/* What the plugin checks of its own settings when it starts, as far as that needs no model. */}}
{{- define "vllm-sparse.checkSparse" -}}
{{- $at := printf "models.%s.sparse" .name -}}
{{- $sparse := .model.sparse -}}
{{- $checks := .root.Files.Get "files/checks.json" | fromJson -}}
{{- $methods := include "vllm-sparse.methods" . | fromJson -}}
{{- $enabled := $methods.enabled -}}
{{- range $methods.needed -}}
{{- if not (has . $enabled) -}}
{{- fail (printf "%s.preset is %s, which needs %s, and methods does not list that; add %s to methods, or leave methods out" $at $sparse.preset . .) -}}
{{- end -}}
{{- end -}}
{{- range $phase := list "prefill" "decode" -}}
{{- $method := default "dense" (get $sparse $phase) -}}
{{- if not (or (eq $method "dense") (has $method $enabled)) -}}
{{- fail (printf "%s.%s is %s, which is not enabled; %s %s.methods, or write one of dense, %s" $at $phase $method (ternary "add it to" (printf "write [%s] in" (append $checks.enabled $method | join ", ")) (hasKey $sparse "methods")) $at ($enabled | join ", ")) -}}
{{- end -}}
{{- $key := printf "sparse_%s" $phase -}}
{{- $method = default "dense" (get $.model.test.extras $key) -}}
{{- if not (or (eq $method "dense") (has $method $enabled)) -}}
{{- fail (printf "models.%s.test.extras.%s is %s, which %s.methods does not enable, so helm test would fail; write there a method that it does (%s), or dense" $.name $key $method $at ($enabled | join ", ")) -}}
{{- end -}}
{{- end -}}
{{- range $method, $defaults := $checks.budgets -}}
{{- with get $sparse $method -}}
{{- $knobs := mergeOverwrite (deepCopy $defaults) . -}}
{{- $forced := add (int64 $knobs.sink_tokens) (max 1 (int64 $knobs.recent_tokens)) | int64 -}}
{{- if lt (int64 $knobs.budget_tokens) $forced -}}
{{- fail (printf "%s.%s.budget_tokens is %d, and sink_tokens %d with recent_tokens %d (at least the newest) take %d; write budget_tokens: %d or more, or lower them" $at $method (int64 $knobs.budget_tokens) (int64 $knobs.sink_tokens) (int64 $knobs.recent_tokens) $forced $forced) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range $method, $pairs := $checks.ordered -}}
{{- $knobs := default dict (get $sparse $method) -}}
{{- range $pairs -}}
{{- $least := default .least.default (get $knobs .least.knob) -}}
{{- $most := default .most.default (get $knobs .most.knob) -}}
{{- if gt (int64 $least) (int64 $most) -}}
{{- fail (printf "%s.%s.%s is %d, below %s %d; raise it or lower that" $at $method .most.knob (int64 $most) .least.knob (int64 $least)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* vLLM reads _ as -, --name.key as a part of --name, and takes the beginning of a name for the name. */}}
{{- define "vllm-sparse.checkArguments" -}}
{{- $at := printf "models.%s" .name -}}
{{- $checks := .root.Files.Get "files/checks.json" | fromJson -}}
{{- $arguments := .model.extraArgs -}}
{{- range $index, $entry := $arguments -}}
{{- $place := printf "%s.extraArgs[%d]" $at $index -}}
{{- $text := include "vllm-sparse.text" $entry -}}
{{- if hasPrefix "--" $text -}}
{{- $argument := $text | splitList "=" | first | splitList "." | first | replace "_" "-" | trimSuffix "+" -}}
{{- range $known, $refusal := $checks.arguments -}}
{{- if hasPrefix $argument $known -}}
{{- if $refusal.setting -}}
{{- fail (printf "%s: %s is not allowed; set %s.%s instead" $place $argument $at $refusal.setting) -}}
{{- else -}}
{{- fail (printf "%s: %s is not allowed: %s" $place $argument $refusal.reason) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $value := "" -}}
{{- if contains "=" $text -}}
{{- $value = regexReplaceAll "^[^=]*=" $text "" -}}
{{- else if lt (add1 $index) (len $arguments) -}}
{{- $value = include "vllm-sparse.text" (index $arguments (add1 $index)) -}}
{{- end -}}
{{- with get $checks.values $argument -}}
{{- $allowed := ternary .gpu .cpu (gt (int $.model.accelerator.count) 0) -}}
{{- if not (has $value $allowed) -}}
{{- fail (printf "%s: %s is %q: %s; write one of %s, or leave it out" $place $argument $value .reason ($allowed | join ", ")) -}}
{{- end -}}
{{- end -}}
{{- if and (eq $argument "--block-size") (gt (mod (int $value) 16) 0) -}}
{{- fail (printf "%s: --block-size is %q, and sparse attention reads pages of 16 tokens; write a multiple of 16, or leave it out" $place $value) -}}
{{- end -}}
{{- if eq $argument "--kv-transfer-config" -}}
{{- $connector := default "" (get (fromJson $value) "kv_connector") -}}
{{- if not (has $connector $checks.connectors) -}}
{{- fail (printf "%s: --kv-transfer-config has kv_connector %q, which would hand blocks of a sparse request to others; write one of %s" $place $connector ($checks.connectors | join ", ")) -}}
{{- end -}}
{{- end -}}
{{- if has $argument (list "--kv-transfer-config" "--kv-offloading-size") -}}
{{- range $checks.summarising -}}
{{- if has . (get (include "vllm-sparse.methods" $ | fromJson) "enabled") -}}
{{- fail (printf "%s: %s does not go with %s of %s.sparse.methods, which keeps summaries of the blocks that a server wrote itself; drop one of the two" $place $argument . $at) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- else if hasPrefix "-" $text -}}
{{- if not (regexMatch "^-[0-9.]" $text) -}}
{{- fail (printf "%s: %s is a short name; write the long one, such as --name=value (tensor and data parallelism: %s.parallelism)" $place ($text | splitList "=" | first) $at) -}}
{{- end -}}
{{- else -}}
{{- $previous := "" -}}
{{- range $earlier := slice $arguments 0 $index -}}
{{- if hasPrefix "--" (include "vllm-sparse.text" $earlier) -}}
{{- $previous = include "vllm-sparse.text" $earlier -}}
{{- end -}}
{{- end -}}
{{- if or (not $previous) (contains "=" $previous) -}}
{{- fail (printf "%s is a value without an argument; write --name=value, or the name before it" $place) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Values can be read by whoever may read the release. */}}
{{- define "vllm-sparse.checkEnvironment" -}}
{{- $at := printf "models.%s" .name -}}
{{- $checks := .root.Files.Get "files/checks.json" | fromJson -}}
{{- $secrets := dict "VLLM_API_KEY" "apiKey" "HF_TOKEN" "hubToken" "HUGGING_FACE_HUB_TOKEN" "hubToken" -}}
{{- range $entry := .model.env -}}
{{- $literal := hasKey $entry "value" -}}
{{- range $variable, $setting := $secrets -}}
{{- if and (eq $entry.name $variable) $literal -}}
{{- fail (printf "%s.env: %s is not allowed, since values are no place for secrets; set %s.%s.existingSecret instead" $at $variable $at $setting) -}}
{{- end -}}
{{- if and (eq $entry.name $variable) (hasKey $entry "valueFrom") (get (get $.model $setting) "existingSecret") -}}
{{- fail (printf "%s.env: %s comes from %s.%s.existingSecret too; drop one of the two" $at $variable $at $setting) -}}
{{- end -}}
{{- end -}}
{{- with get $checks.environment $entry.name -}}
{{- if $literal -}}
{{- if not (has (include "vllm-sparse.text" $entry.value) .allowed) -}}
{{- fail (printf "%s.env: %s is not allowed: %s" $at $entry.name .reason) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "vllm-sparse.checkVolumes" -}}
{{- $at := printf "models.%s" .name -}}
{{- $paths := dict "/var/cache/vllm-sparse" "the chart's cache" "/tmp" "the chart's temporary space" "/dev/shm" "the chart's shared memory" "/models" "the model" "/etc/vllm-sparse/files" "the model's files" "/etc/vllm-sparse/scripts" "the chart's scripts" -}}
{{- range $index, $mount := .model.extraVolumeMounts -}}
{{- $path := trimSuffix "/" (default "" $mount.mountPath) -}}
{{- $place := printf "%s.extraVolumeMounts[%d].mountPath" $at $index -}}
{{- with get $paths $path -}}
{{- fail (printf "%s is %s, where %s is mounted; write another folder" $place $path .) -}}
{{- end -}}
{{- $_ := set $paths $path (printf "volume %s" $mount.name) -}}
{{- end -}}
{{- range list "initContainers" "sidecars" -}}
{{- $setting := . -}}
{{- range $index, $container := get $.model $setting -}}
{{- if has $container.name (list "server" "device") -}}
{{- fail (printf "%s.%s[%d].name is %s, which the chart has already; write another name" $at $setting $index $container.name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $names := dict -}}
{{- range list "cache" "tmp" "shm" "model" "scripts" "files" -}}
{{- $_ := set $names . "the chart" -}}
{{- end -}}
{{- range $index, $volume := .model.extraVolumes -}}
{{- with get $names $volume.name -}}
{{- fail (printf "%s.extraVolumes[%d].name is %s, which %s has already; write another name" $at $index $volume.name .) -}}
{{- end -}}
{{- $_ := set $names $volume.name (printf "extraVolumes[%d]" $index) -}}
{{- end -}}
{{- end }}
