package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"regexp"
	"strconv"
	"strings"
	"sync"
)

// RegistryCounters say what was asked of a -registry port since the last reset.
type RegistryCounters struct {
	// By path: how often, how often refused, and the bytes of the answers' bodies.
	Manifests map[string]*Asked `json:"manifests"`
	Blobs     map[string]*Asked `json:"blobs"`
	// Sums over the blobs that are no configurations.
	LayerGets    int64  `json:"layer_gets"`
	LayerBytes   int64  `json:"layer_bytes"`
	LayerRefused int64  `json:"layer_refused"`
	Layers       string `json:"layers"`
}

// Asked counts one path.
type Asked struct {
	Heads   int64 `json:"heads,omitempty"`
	Gets    int64 `json:"gets"`
	Refused int64 `json:"refused,omitempty"`
	Bytes   int64 `json:"bytes"`
	// A configuration, or a blob that was allowed by name.
	Config bool `json:"config,omitempty"`
}

// guard is an HTTP server of our own, between the port and the registry.
type guard struct {
	address string
	proxy   *httputil.ReverseProxy

	mutex     sync.Mutex
	refuse    bool
	configs   map[string]bool // digests
	manifests map[string]*Asked
	blobs     map[string]*Asked
}

var (
	blobPath     = regexp.MustCompile(`^/v2/.+/blobs/(sha256:[0-9a-f]{64})$`)
	manifestPath = regexp.MustCompile(`^/v2/.+/manifests/[^/]+$`)
)

func newGuard(target string) (*guard, error) {
	g := &guard{configs: map[string]bool{}}
	g.reset()
	g.proxy = &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme, r.Out.URL.Host = "http", target
			// The registry makes upload addresses from it, which must lead back through us.
			r.Out.Host = r.In.Host
		},
		ModifyResponse: g.seen,
		Transport:      &http.Transport{MaxIdleConnsPerHost: 64, DisableCompression: true},
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
			log.Printf("%s %s: %v", r.Method, r.URL.Path, err)
			w.WriteHeader(http.StatusBadGateway)
		},
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	g.address = listener.Addr().String()
	go func() { log.Fatal(http.Serve(listener, g)) }()
	return g, nil
}

func (g *guard) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if m := blobPath.FindStringSubmatch(r.URL.Path); m != nil && g.refuses(r, m[1]) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusForbidden)
		_, _ = io.WriteString(w, `{"errors":[{"code":"DENIED","message":"this link lets no layer pass"}]}`)
		return
	}
	g.proxy.ServeHTTP(w, r)
}

// asked finds the counters of a path, which must be a blob's or a manifest's; the mutex is held.
func (g *guard) asked(path string) *Asked {
	table := g.blobs
	if manifestPath.MatchString(path) {
		table = g.manifests
	}
	if table[path] == nil {
		table[path] = &Asked{}
	}
	return table[path]
}

func (g *guard) refuses(r *http.Request, digest string) bool {
	g.mutex.Lock()
	defer g.mutex.Unlock()
	a := g.asked(r.URL.Path)
	a.Config = g.configs[digest]
	switch r.Method {
	case http.MethodHead:
		a.Heads++
		return false
	case http.MethodGet:
		a.Gets++
	default:
		return false
	}
	if g.refuse && !a.Config {
		a.Refused++
		return true
	}
	return false
}

// seen learns configurations from manifests, and counts bodies.
func (g *guard) seen(response *http.Response) error {
	path, method := response.Request.URL.Path, response.Request.Method
	manifest := manifestPath.MatchString(path)
	if !manifest && !blobPath.MatchString(path) {
		return nil
	}
	if manifest {
		g.mutex.Lock()
		switch method {
		case http.MethodHead:
			g.asked(path).Heads++
		case http.MethodGet:
			g.asked(path).Gets++
		}
		g.mutex.Unlock()
	}
	if method != http.MethodGet || response.StatusCode >= 300 {
		return nil
	}
	if manifest {
		body, err := io.ReadAll(io.LimitReader(response.Body, 8<<20))
		if err != nil {
			return err
		}
		_ = response.Body.Close()
		response.Body = io.NopCloser(bytes.NewReader(body))
		response.ContentLength = int64(len(body))
		response.Header.Set("Content-Length", strconv.Itoa(len(body)))
		g.learn(body)
	}
	response.Body = &counted{ReadCloser: response.Body, guard: g, path: path}
	return nil
}

func (g *guard) learn(body []byte) {
	var manifest struct {
		Config struct {
			Digest string `json:"digest"`
		} `json:"config"`
	}
	if json.Unmarshal(body, &manifest) != nil || manifest.Config.Digest == "" {
		return
	}
	g.mutex.Lock()
	defer g.mutex.Unlock()
	g.configs[manifest.Config.Digest] = true
}

type counted struct {
	io.ReadCloser
	guard *guard
	path  string
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.ReadCloser.Read(p)
	if n > 0 {
		c.guard.mutex.Lock()
		c.guard.asked(c.path).Bytes += int64(n)
		c.guard.mutex.Unlock()
	}
	return n, err
}

func (g *guard) reset() {
	g.mutex.Lock()
	defer g.mutex.Unlock()
	g.manifests, g.blobs = map[string]*Asked{}, map[string]*Asked{}
}

func (g *guard) configure(r *http.Request) error {
	g.mutex.Lock()
	defer g.mutex.Unlock()
	switch v := r.FormValue("layers"); v {
	case "refuse":
		g.refuse = true
	case "allow":
		g.refuse = false
	default:
		return fmt.Errorf("layers: %q is neither refuse nor allow", v)
	}
	for _, digest := range strings.FieldsFunc(r.FormValue("allow"), func(c rune) bool { return c == ',' }) {
		g.configs[digest] = true
	}
	return nil
}

func (g *guard) counters() *RegistryCounters {
	g.mutex.Lock()
	defer g.mutex.Unlock()
	c := &RegistryCounters{Manifests: map[string]*Asked{}, Blobs: map[string]*Asked{}, Layers: "allow"}
	if g.refuse {
		c.Layers = "refuse"
	}
	for path, a := range g.manifests {
		copied := *a
		c.Manifests[path] = &copied
	}
	for path, a := range g.blobs {
		copied := *a
		c.Blobs[path] = &copied
		if !a.Config {
			c.LayerGets += a.Gets
			c.LayerBytes += a.Bytes
			c.LayerRefused += a.Refused
		}
	}
	return c
}
