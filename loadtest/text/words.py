"""Word lists of the text generator: plain English words, each a single token of the test model's tokenizer.

`KEY_NOUNS` may be asked for in a needle; all of them occur in ordinary sentences too, so that a key alone does not
give a needle away.
"""


def _words(*lines: str) -> tuple[str, ...]:
    """The words of `lines`, in order, each once."""
    return tuple(dict.fromkeys(" ".join(lines).split()))


PEOPLE = _words(
    "captain sailor miller baker teacher doctor farmer hunter painter singer writer poet judge lawyer soldier",
    "merchant tailor butcher smith carpenter mason weaver potter shepherd fisherman gardener cook waiter driver pilot",
    "nurse surgeon student professor scholar librarian clerk banker broker grocer barber cobbler jeweller printer",
    "engineer builder plumber miner ranger guard warden sheriff mayor governor minister king queen prince princess",
    "duke duchess baron knight squire monk priest bishop abbot nun pilgrim traveller stranger guest neighbour friend",
    "cousin uncle aunt brother sister father mother grandfather grandmother child boy girl widow orphan apprentice",
    "master servant butler porter messenger postman herald drummer fiddler piper dancer actor juggler clown wizard",
    "witch giant thief pirate smuggler beggar hermit prophet inventor chemist botanist astronomer geologist historian",
)

PLACES = _words(
    "harbour mill lighthouse tower castle bridge market village city town house cottage cabin barn stable farm field",
    "meadow garden orchard vineyard forest wood grove hill mountain valley canyon cliff cave beach shore island bay",
    "lagoon lake pond river stream brook waterfall spring well swamp marsh desert dune plain prairie moor glacier",
    "volcano crater quarry mine tunnel road street lane alley path trail crossing square park playground fountain",
    "monument statue cemetery chapel church cathedral abbey monastery temple shrine palace fortress citadel dungeon",
    "prison barracks armoury arsenal school college university library museum gallery theatre cinema opera circus",
    "stadium gymnasium arena hospital clinic pharmacy bakery brewery winery dairy tavern inn hotel hostel restaurant",
    "kitchen pantry cellar attic parlour bedroom nursery hall corridor staircase balcony terrace porch veranda",
    "courtyard gate fence wall moat drawbridge dock pier wharf jetty shipyard marina canal dam reservoir aqueduct",
    "station platform depot garage workshop factory foundry forge sawmill warehouse granary silo windmill",
    "greenhouse laboratory observatory planetarium office studio shop bazaar bank treasury mint embassy court",
    "parliament capital province county district border frontier outpost camp settlement colony ranch estate mansion",
    "villa manor chalet igloo tent pavilion kiosk stall booth zoo aquarium aviary kennel henhouse beehive",
)

THINGS = _words(
    "boat ship raft canoe ferry barge yacht steamer anchor sail mast rudder oar compass map globe telescope microscope",
    "lantern lamp candle torch mirror window door key lock chain rope hammer saw axe chisel anvil shovel rake hoe",
    "plough scythe sickle wheel cart wagon carriage coach sledge bicycle tractor engine locomotive train tram bus",
    "lorry balloon airship glider kite drum flute violin cello piano organ trumpet harp guitar bell clock watch",
    "calendar book letter parcel envelope stamp newspaper diary ledger manuscript scroll poem song picture portrait",
    "painting photograph camera brush easel canvas vase bowl plate cup mug jug kettle teapot pot pan oven stove",
    "furnace chimney fireplace table chair stool bench sofa cradle bed pillow blanket quilt curtain carpet rug basket",
    "bucket barrel crate chest trunk drawer cupboard wardrobe shelf cabinet purse wallet coin medal crown sword shield",
    "helmet armour spear bow arrow cannon pistol saddle bridle horseshoe whip boot shoe sandal hat cap bonnet scarf",
    "glove coat jacket cloak shirt skirt apron ribbon button needlework necklace bracelet ring pearl diamond emerald",
    "ruby sapphire crystal marble statuette carving bread cake pie loaf cheese butter apple pear plum peach cherry",
    "lemon orange melon grape walnut acorn chestnut pumpkin carrot onion cabbage potato turnip mushroom rose",
    "lily tulip",
    "daisy orchid violet fern ivy thistle oak elm birch willow maple pine cedar cypress horse pony donkey mule cow",
    "goat sheep lamb pig dog cat rabbit hare fox wolf bear deer badger otter beaver squirrel hedgehog mouse owl eagle",
    "falcon raven crow robin sparrow swallow swan goose duck hen rooster peacock parrot pelican turtle frog",
    "toad lizard",
    "snake spider beetle butterfly dragonfly salmon trout whale dolphin seal walrus octopus lobster crab elephant lion",
    "tiger leopard camel giraffe zebra monkey tiger puzzle doll puppet marionette trophy banner flag tapestry",
)

KEY_NOUNS = tuple(dict.fromkeys((*PEOPLE, *PLACES, *THINGS)))

# Verbs of motion, used with a preposition and a place.
MOTION_VERBS = _words(
    "walked wandered travelled hurried marched strolled ran rode drove sailed drifted crawled climbed jumped danced",
    "limped stumbled slipped raced rushed trudged hiked roamed swam rowed paddled galloped trotted tiptoed crept",
    "slept waited rested stood sat knelt sang whistled shouted whispered wept laughed smiled worked played prayed",
    "camped hid lingered paused stopped vanished appeared arrived lived settled gathered",
)

# Verbs with a direct object.
ACTION_VERBS = _words(
    "found lost saw heard watched followed carried lifted dropped moved pushed pulled opened closed locked painted",
    "cleaned washed polished repaired mended broke built made designed drew described sketched photographed measured",
    "counted weighed bought sold traded borrowed lent stole hid buried discovered explored visited left entered",
    "guarded defended attacked captured rescued freed helped thanked praised blamed questioned answered greeted",
    "welcomed invited ignored avoided feared loved hated admired envied trusted doubted remembered forgot recognised",
    "noticed observed studied examined inspected searched cooked baked burned lit extinguished filled emptied covered",
    "uncovered wrapped folded tied untied cut carved planted watered harvested fed chased caught released trained",
    "tamed inherited kept collected gave showed offered sent brought delivered returned received accepted refused",
    "owned wanted needed chose named called touched held raised lowered decorated restored",
)

ADJECTIVES = _words(
    "old young new ancient modern small little tiny large big huge tall short long narrow wide deep shallow high low",
    "steep flat round straight crooked heavy light thick thin strong weak hard soft rough smooth sharp blunt bright",
    "dark pale dim clear cloudy foggy misty rainy sunny windy stormy calm quiet silent loud noisy busy empty full",
    "crowded lonely hidden secret famous unknown strange odd curious common rare precious cheap costly rich",
    "poor humble",
    "proud brave timid clever foolish wise honest cunning kind cruel gentle fierce friendly polite rude merry",
    "sad happy",
    "gloomy cheerful angry patient eager lazy idle tired weary sleepy hungry thirsty sick healthy lame blind deaf",
    "warm cool hot cold frozen icy snowy dusty muddy wet dry damp dirty clean shiny rusty golden silver wooden stone",
    "iron copper bronze brass leather woollen silken velvet glass paper red blue green yellow white black grey brown",
    "purple pink scarlet crimson amber ivory beautiful pretty ugly plain handsome elegant graceful clumsy splendid",
    "magnificent modest simple complex solid hollow broken cracked ruined faded torn worn fresh ripe rotten sweet sour",
    "bitter salty spicy fragrant northern southern eastern western distant nearby remote foreign local royal noble",
    "holy sacred haunted enchanted magical mysterious peaceful dangerous safe useful useless perfect faithful careful",
    "careless nervous restless serious solemn stubborn generous greedy jealous loyal mighty delicate fragile sturdy",
)

ADVERBS = _words(
    "slowly quickly quietly loudly carefully carelessly bravely calmly eagerly gladly gently happily sadly proudly",
    "politely patiently nervously secretly suddenly silently softly swiftly steadily safely rarely often seldom always",
    "usually sometimes finally nearly hardly barely easily kindly warmly coldly boldly wearily cheerfully solemnly",
    "thoughtfully gracefully clumsily lazily hastily freely openly wisely foolishly gratefully again together alone",
)

NAMES = _words(
    "Anna Clara Emma Flora Greta Helen Irene Julia Karen Laura Maria Nora Olga Paula Rosa Sarah Tessa Ursula Vera",
    "Wendy Yvonne Zelda Agnes Beatrice Cecilia Dora Edith Frieda Gloria Hilda Ida Jane Kate Lucy Martha Nina Ophelia",
    "Adam Boris Carl David Edgar Felix Georg Henry Isaac Jacob Konrad Leo Martin Niels Oscar Peter Quentin Robert",
    "Simon Thomas Ulrich Victor Walter Xavier Yusuf Albert Bernard Charles Daniel Edward Frank Gilbert Harold Ivan",
    "John Kevin Louis Matthew Norman Oliver Philip Ralph Samuel Theodore Vincent William",
)

PREPOSITIONS = _words(
    "along across beside behind near past through towards around beyond above below beneath inside outside under over",
    "into from to at in by before after opposite",
)

WEEKDAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _words("January February March April May June July August September October November December")

# Words of the sentence patterns, the needles, the questions and of short instructions.
FUNCTION_WORDS = _words(
    "the a an this that these those each every some any no all both another other one two three four five six seven",
    "eight nine ten twelve twenty hundred thousand first second third last next same such only own many much more most",
    "few less least and or but nor so yet because although though while when whenever where wherever who whom whose",
    "which what why how if unless until since before after as than then there here now later soon once twice",
    "never ever",
    "still already just also too very quite rather almost even not of in on at by for with without about against",
    "between among during to from up down off out back away over under he she it they we you I him her them us me his",
    "hers its their our your my is are was were be been being am do does did has have had will would can could shall",
    "should may might must code codes number numbers value values remember note recall tell say give find know known",
    "according text document page line word words sentence paragraph question answer questions answers people person",
    "man woman men women day days night nights week weeks month months year years morning evening afternoon noon",
    "midnight winter summer autumn time times hour hours minute minutes rooms coins metres miles people horses books",
    "trees steps built bought sold opened closed counted total nobody everyone someone everything nothing something",
    "please read carefully following above below grass sky sun go come we went came yes thanks hello user system",
    "assistant helpful use exact only reply belong belongs said told asked thought knew believed hoped seemed looked",
    "became remained grew turned went far long ago story tale rumour weather wind rain snow sea water fire smoke light",
)
